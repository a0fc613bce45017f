"""One end of state transfers over HTTP, and of the same bytes over bare TCP.

The state is `--count` tensors of `--mib` MiB in all. Each round moves it in every way that the implementation has: into
fresh memory (without and with `num_chunks`), and, where `HTTPTransport` takes a `state_dict`, into the receiver's own
tensors. Beside it, `recv_into` of 1 MiB from one and from two TCP streams into those same tensors, checked by nobody:
what the kernel gives. The receiver tells the seconds of each, from when the source may begin until everything is there,
and both what their memory peaked at beyond what they held before.
"""

import argparse
import inspect
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from report import hello, say
from torch.distributed import TCPStore

from torchft.checkpointing import HTTPTransport

TIMEOUT = timedelta(seconds=60)
MIB = 1 << 20
State = dict[str, torch.Tensor]


def memory(field: str) -> int:
    """Bytes, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not tell {field}")


def peak_anew() -> int:
    """From here on the peak is counted anew; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def views_of(state: State, streams: int) -> list[list[memoryview]]:
    """The state's memory, dealt to so many streams."""
    out: list[list[memoryview]] = [[] for _ in range(streams)]
    for i, tensor in enumerate(state.values()):
        out[i % streams].append(memoryview(tensor.numpy()).cast("B"))
    return out


def send_all(sock: socket.socket, views: list[memoryview]) -> None:
    for view in views:
        sock.sendall(view)


def receive_all(sock: socket.socket, views: list[memoryview]) -> None:
    for view in views:
        at = 0
        while at < len(view):
            got = sock.recv_into(view[at : at + MIB], 0, socket.MSG_WAITALL)
            if not got:
                raise RuntimeError("the other end is gone")
            at += got


def at_once(move: object, sockets: list[socket.socket], state: State) -> None:
    parts = views_of(state, len(sockets))
    threads = [threading.Thread(target=move, args=pair) for pair in zip(sockets, parts, strict=True)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def transports(state: State | None) -> dict[str, HTTPTransport]:
    """By the name of the way: of a source if there is no state to receive into."""
    out = {"fresh": HTTPTransport(TIMEOUT, 0), "chunks": HTTPTransport(TIMEOUT, 8)}
    if "state_dict" in inspect.signature(HTTPTransport.__init__).parameters:
        out["place"] = HTTPTransport(TIMEOUT, snapshot="lock", state_dict=None if state is None else lambda: state)
    return out


def serve(store: TCPStore, state: State, rounds: int) -> None:
    ways = transports(None)
    listener = socket.create_server(("127.0.0.1", 0))
    store.set("port", str(listener.getsockname()[1]))
    sockets = [listener.accept()[0] for _ in range(2)]
    step = 0
    beyond: dict[str, int] = {}
    for n in range(rounds):
        for way, transport in ways.items():
            step += 1
            for tensor in state.values():
                tensor[0] = tensor[-1] = float(step)
            held = peak_anew()
            store.set(f"metadata{step}", transport.metadata())
            store.wait([f"go{step}"], TIMEOUT)
            transport.send_checkpoint([1], step, state, TIMEOUT)
            store.wait([f"done{step}"], TIMEOUT)
            transport.disallow_checkpoint()
            beyond[way] = max(beyond.get(way, 0), memory("VmHWM") - held)
        for streams in (1, 2):
            store.wait([f"raw{n}.{streams}"], TIMEOUT)
            at_once(send_all, sockets[:streams], state)
    for way, nbytes in beyond.items():
        say("memory", way=way, beyond=nbytes)
    for transport in ways.values():
        transport.shutdown()


def receive(store: TCPStore, state: State, rounds: int) -> None:
    ways = transports(state)
    store.wait(["port"], TIMEOUT)
    sockets = [socket.create_connection(("127.0.0.1", int(store.get("port")))) for _ in range(2)]
    step = 0
    beyond: dict[str, int] = {}
    for n in range(rounds):
        for way, transport in ways.items():
            step += 1
            store.wait([f"metadata{step}"], TIMEOUT)
            metadata = store.get(f"metadata{step}").decode()
            held = peak_anew()
            began = time.perf_counter()
            store.set(f"go{step}", "")
            got = transport.recv_checkpoint(0, metadata, step, TIMEOUT)
            took = time.perf_counter() - began
            beyond[way] = max(beyond.get(way, 0), memory("VmHWM") - held)
            store.set(f"done{step}", "")
            wrong = [k for k, t in got.items() if float(t[0]) != step or float(t[-1]) != step]
            if wrong:
                raise RuntimeError(f"step {step}: {wrong[:5]} are not what was sent")
            del got
            say("moved", way=way, seconds=took)
        for streams in (1, 2):
            began = time.perf_counter()
            store.set(f"raw{n}.{streams}", "")
            at_once(receive_all, sockets[:streams], state)
            say("moved", way=f"raw{streams}", seconds=time.perf_counter() - began)
    for way, nbytes in beyond.items():
        say("memory", way=way, beyond=nbytes)
    for transport in ways.values():
        transport.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True, help="0: the source, which hosts the store")
    parser.add_argument("--port", type=int, default=0, help="of the store")
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()
    store = TCPStore("127.0.0.1", args.port, is_master=args.rank == 0, wait_for_workers=False)
    if args.rank == 0:
        say("store", port=store.port)
    state = {f"tensor{i}": torch.zeros(args.mib * MIB // args.count // 4) for i in range(args.count)}
    (serve if args.rank == 0 else receive)(store, state, args.rounds)
    say("over", total=sum(t.nbytes for t in state.values()))
    stop.wait()


if __name__ == "__main__":
    main()
