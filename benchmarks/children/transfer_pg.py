"""One end of state transfers over a process group, and of the same bytes over gloo alone.

The state is `--count` tensors of `--mib` MiB in all. Each round moves it twice: with `PGTransport` into the receiver's
own tensors, and with bare `send` and `recv` of torch's gloo, one message a tensor, checked by nobody: what the
processes, the sockets and the memory give. The receiver tells the seconds of both, from when the source may begin until
everything is there, and what its memory peaked at beyond what it held before the first round.
"""

import argparse
import time
from datetime import timedelta
from pathlib import Path

import torch
from report import hello, say
from torch.distributed import PrefixStore, TCPStore
from torch.distributed import ProcessGroupGloo as Gloo

from torchft import ProcessGroupGloo
from torchft.checkpointing.pg_transport import PGTransport

TIMEOUT = timedelta(seconds=60)
MIB = 1 << 20


def memory(field: str) -> int:
    """Bytes, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not tell {field}")


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
    total = sum(t.nbytes for t in state.values())
    bare = Gloo(PrefixStore("bare", store), args.rank, 2, TIMEOUT)
    pg = ProcessGroupGloo(timeout=TIMEOUT)
    pg.configure(f"127.0.0.1:{store.port}/transport", f"rank{args.rank}", args.rank, 2)
    transport = PGTransport(pg, timeout=TIMEOUT, device=torch.device("cpu"), state_dict=lambda: state)
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    for n in range(args.rounds):
        for kind in ("transport", "bare"):
            mark = float(n + 1 if kind == "transport" else -n - 1)
            if args.rank == 0:
                for tensor in state.values():
                    tensor[0] = tensor[-1] = mark
                store.wait([f"{kind}{n}"], TIMEOUT)
                if kind == "transport":
                    transport.send_checkpoint([1], n, state, TIMEOUT)
                else:
                    for work in [bare.send([t], 1, 0) for t in state.values()]:
                        work.wait()
                continue
            began = time.perf_counter()
            store.set(f"{kind}{n}", "go")
            if kind == "transport":
                transport.recv_checkpoint(0, transport.metadata(), n, TIMEOUT)
            else:
                for work in [bare.recv([t], 0, 0) for t in state.values()]:
                    work.wait()
            took = time.perf_counter() - began
            wrong = [k for k, t in state.items() if float(t[0]) != mark or float(t[-1]) != mark]
            if wrong:
                raise RuntimeError(f"round {n} of {kind}: {wrong[:5]} are not what was sent")
            say(kind, seconds=took, total=total)
    if args.rank == 1:
        say("memory", beyond=memory("VmHWM") - held, total=total)
    stop.wait()


if __name__ == "__main__":
    main()
