"""How fast a state moves over a process group into memory that is there, beside gloo alone in the same processes."""

from __future__ import annotations

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.ends import Ends

__all__ = ["CASES"]

_ROUNDS = 5


def _transfer(run: Run, mib: int, count: int) -> Figures:
    ends = Ends(run, "transfer_pg.py", mib, count, _ROUNDS)
    speed = ends.speed()
    figures: Figures = {
        "in place, GB/s": speed["place"],
        "gloo alone, GB/s": speed["bare"],
        "of gloo alone, fraction": speed["place"] / speed["bare"],
        "receiver's memory beyond the state, MB": ends.beyond("place") / 1e6,
    }
    if "place, few" in speed:
        figures["time in place, of 20 tensors' time, times"] = speed["place, few"] / speed["place"]
    return figures


def _case(name: str, mib: int, count: int) -> Case:
    about = f"{mib} MiB in {count} tensors by PGTransport into memory that is there, beside gloo alone"
    return Case(f"transfer-pg-{name}", about, lambda run: _transfer(run, mib, count), target="at least 1.1 of the peer")


CASES = (
    _case("256", 256, 20),
    _case("1024", 1024, 20),
    _case("4096", 4096, 20),
    _case("4096-many", 4096, 4000),
)
