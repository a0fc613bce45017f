"""One end of state transfers over a process group, and of the same bytes over gloo alone.

The state is `--count` tensors of `--mib` MiB in all. Each round moves it twice, in an order that changes: with
`PGTransport` into the receiver's own tensors (a state of many tensors: in turns with one of few), and with bare `send`
and `recv` of torch's gloo, one message a tensor, checked by nobody: what the processes, the sockets and the memory
give. The receiver tells the seconds of both, from when the source may begin until everything is there, and what its
memory peaked at beyond what it held before the first round.
"""

import time

import torch
from ends import TIMEOUT, End, check, in_turn, mark, peak, peak_anew, run
from report import say
from torch.distributed import PrefixStore
from torch.distributed import ProcessGroupGloo as Gloo

from torchft import ProcessGroupGloo
from torchft.checkpointing.pg_transport import PGTransport


def move(end: End) -> None:
    states = {"place": end.state, "place, few": end.few, "bare": end.state}
    ways = [way for way, state in states.items() if state]
    bare = Gloo(PrefixStore("bare", end.store), end.rank, 2, TIMEOUT)
    pg = ProcessGroupGloo(timeout=TIMEOUT)
    pg.configure(f"127.0.0.1:{end.store.port}/transport", f"rank{end.rank}", end.rank, 2)
    state = end.state
    transport = PGTransport(pg, timeout=TIMEOUT, device=torch.device("cpu"), state_dict=lambda: state)
    before = peak_anew()
    for n in range(end.rounds):
        for way in in_turn(ways, n):
            state = states[way]
            value = float(-n - 1 if way == "bare" else n + 1)
            if end.sends:
                mark(state, value)
                end.store.set(f"marked {way}{n}", "")
                end.store.wait([f"{way}{n}"], TIMEOUT)
                if way != "bare":
                    transport.send_checkpoint([1], n, state, TIMEOUT)
                else:
                    for work in [bare.send([t], 1, 0) for t in state.values()]:
                        work.wait()
                continue
            end.store.wait([f"marked {way}{n}"], TIMEOUT)
            began = time.perf_counter()
            end.store.set(f"{way}{n}", "go")
            if way != "bare":
                transport.recv_checkpoint(0, transport.metadata(), n, TIMEOUT)
            else:
                for work in [bare.recv([t], 0, 0) for t in state.values()]:
                    work.wait()
            say("moved", way=way, seconds=time.perf_counter() - began)
            check(state, value, f"round {n} of {way}")
    say("memory", way="place", beyond=peak() - before)


if __name__ == "__main__":
    run(__doc__, move)
