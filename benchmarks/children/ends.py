"""What both ends of a measured transfer share: the state, the store they meet at, and what their memory peaked at."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from report import hello, say
from torch.distributed import TCPStore

TIMEOUT = timedelta(seconds=60)
MIB = 1 << 20
FEW = 20
"""Tensors that a state of many is held against."""
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class End:
    """One of the two processes."""

    rank: int
    """0: the source, which hosts the store."""
    store: TCPStore
    state: State
    few: State
    """As many bytes in few tensors; empty if the state is few tensors itself. Whoever is done with it clears it."""
    rounds: int

    @property
    def sends(self) -> bool:
        return self.rank == 0


def in_turn(ways: list[str], n: int) -> list[str]:
    """The ways of round ``n``. Where one stands tells in its time, and what came before it: all change places."""
    first = n // 2 % max(1, len(ways))
    turned = [*ways[first:], *ways[:first]]
    return turned[::-1] if n % 2 else turned


def mark(state: State, value: float) -> None:
    """Makes the state one that was not sent before."""
    for tensor in state.values():
        tensor[0] = tensor[-1] = value


def zeros(mib: int, count: int) -> tuple[State, State]:
    """A state of so many MiB in so many tensors of one size, and the same in few if these are many.

    The two are made a piece at a time, in turns: memory that the system gives first is up to a tenth slower to read
    and write than what it gives later, and neither state is to have more of it.
    """
    state: State = {}
    few: State = {}
    rest = _tensors(mib, count)
    if count > FEW:
        for name, tensor in _tensors(mib, FEW):
            few[name] = tensor
            state.update(itertools.islice(rest, count // FEW))
    state.update(rest)
    return state, few


def _tensors(mib: int, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"tensor{i}", torch.zeros(mib * MIB // count // 4)) for i in range(count))


def held() -> int:
    """Bytes of memory in use."""
    return _status("VmRSS")


def peak() -> int:
    """Bytes of memory in use when it was most, since :func:`peak_anew`."""
    return _status("VmHWM")


def peak_anew() -> int:
    """From here on the peak is counted anew; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return held()


def check(state: State, value: float, what: str) -> None:
    """
    Raises:
        RuntimeError: the state is not the one that was marked so.
    """
    wrong = [k for k, t in state.items() if float(t[0]) != value or float(t[-1]) != value]
    if wrong:
        raise RuntimeError(f"{what}: {wrong[:5]} are not what was sent")


def run(about: str | None, move: Callable[[End], None]) -> None:
    """Reads the arguments, meets the other end, moves, says `over` with the state's bytes, and waits for `stop`."""
    parser = argparse.ArgumentParser(description=about)
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
    state, few = zeros(args.mib, args.count)
    total = sum(t.nbytes for t in state.values())
    move(End(args.rank, store, state, few, args.rounds))
    say("over", total=total)
    stop.wait()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not tell {field}")
