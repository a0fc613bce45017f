"""How fast a state moves between two processes on one machine, beside what the machine can do.

    python benchmarks/transfer.py 8 256 1024 --repeat 5

Two processes on loopback, each size in MB (10^6 bytes), split into tensors of at most 64 MB plus a few small ones. For
HTTP, the time is from before ``send_checkpoint`` at the source until the receiver has the verified state; for the
process group likewise. ``raw`` is ``sendall``/``recv_into`` of one TCP stream without hashing. Medians.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import socket
import statistics
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from torchft.checkpointing import CheckpointTransport, HTTPTransport, PGTransport

TIMEOUT = timedelta(seconds=30)
State = dict[str, dict[str, torch.Tensor]]


def make_state(megabytes: int, fill: int) -> State:
    """Tensors of that many MB in all."""
    left = megabytes * 10**6
    model: dict[str, torch.Tensor] = {}
    while left > 0:
        n = min(left, 64 * 10**6)
        model[f"layer{len(model)}.weight"] = torch.full((n // 4,), float(fill))
        model[f"layer{len(model)}.bias"] = torch.full((1024,), float(fill))
        left -= n
    return {"model": model}


def make_transport(kind: str, rank: int, port: int, state: State | None) -> CheckpointTransport[State]:
    into = None if state is None else lambda: state
    if kind == "http":
        return HTTPTransport(TIMEOUT, state_dict=into)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False)
    group = dist.ProcessGroupGloo(store, rank, 2, TIMEOUT)
    return PGTransport(group, TIMEOUT, torch.device("cpu"), into)


def source(pipe: Connection, kind: str, port: int, megabytes: int, repeat: int) -> None:
    transport = make_transport(kind, 0, port, None)
    state = make_state(megabytes, 1)
    for step in range(repeat):
        pipe.recv()
        pipe.send((transport.metadata(), time.monotonic()))
        transport.send_checkpoint([1], step, state, TIMEOUT)
        pipe.recv()
        transport.disallow_checkpoint()
    transport.shutdown()


def measure(kind: str, megabytes: int, in_place: bool, repeat: int) -> float:
    """GB/s, median."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(target=source, daemon=True, args=(theirs, kind, port, megabytes, repeat))
    process.start()
    try:
        live = make_state(megabytes, 0)
        transport = make_transport(kind, 1, port, live if in_place else None)
        seconds = []
        for step in range(repeat):
            ours.send("go")
            metadata, started = ours.recv()
            got = transport.recv_checkpoint(0, metadata, step, TIMEOUT)
            seconds.append(time.monotonic() - started)
            ours.send("done")
            assert float(got["model"]["layer0.weight"][-1]) == 1.0
            del got
        transport.shutdown()
        process.join(30)
    finally:
        process.kill()
        process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the source ended with {process.exitcode}")
    return megabytes / 1e3 / statistics.median(seconds[1:])


def raw_source(port: int, size: int, repeat: int) -> None:
    data = memoryview(torch.ones(size, dtype=torch.uint8).numpy())
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(repeat):
            sock.recv(1)
            sock.sendall(data)


def raw(megabytes: int, repeat: int) -> float:
    """GB/s of one TCP stream, median."""
    size = megabytes * 10**6
    view = memoryview(torch.zeros(size, dtype=torch.uint8).numpy())
    with socket.create_server(("127.0.0.1", 0)) as server:
        args = (server.getsockname()[1], size, repeat)
        process = mp.get_context("spawn").Process(target=raw_source, daemon=True, args=args)
        process.start()
        sock, _ = server.accept()
        seconds = []
        with sock:
            for _ in range(repeat):
                started = time.monotonic()
                sock.sendall(b"g")
                got = 0
                while got < size:
                    got += sock.recv_into(view[got : got + (1 << 20)])
                seconds.append(time.monotonic() - started)
    process.join(30)
    return megabytes / 1e3 / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("megabytes", type=int, nargs="+")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print(f"{'MB':>6} {'raw':>7} {'http':>7} {'http+':>7} {'pg':>7} {'pg+':>7}   GB/s (+: in place)", flush=True)
    for megabytes in options.megabytes:
        values = [raw(megabytes, options.repeat)]
        values += [measure(k, megabytes, p, options.repeat) for k in ("http", "pg") for p in (False, True)]
        print(f"{megabytes:>6} " + " ".join(f"{v:7.2f}" for v in values), flush=True)


if __name__ == "__main__":
    main()
