"""How fast a state moves over a process group into memory that is there, beside gloo alone in the same processes."""

from __future__ import annotations

import statistics

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.processes import CHILDREN, Cluster

__all__ = ["CASES"]

_ROUNDS = 5


def _transfer(run: Run, mib: int, count: int) -> Figures:
    rounds = 2 if run.quick else _ROUNDS
    if run.quick:
        mib, count = min(mib, 64), min(count, 20)
    script = CHILDREN / "transfer_pg.py"
    args = ("--mib", mib, "--count", count, "--rounds", rounds)
    with Cluster() as cluster:
        source = cluster.spawn(run.impl, script, "--rank", 0, *args, name="source")
        source.hello()
        port = source.wait("store", 30)["port"]
        receiver = cluster.spawn(run.impl, script, "--rank", 1, "--port", port, *args, name="receiver")
        receiver.hello()
        memory = receiver.wait("memory", 200)
        for child in (source, receiver):
            child.tell("stop")
        for child in (source, receiver):
            if child.end(60) != 0:
                raise child.error("failed at its end")
        total = float(memory["total"])
        seconds = {k: statistics.median(e["seconds"] for e in receiver.all(k)) for k in ("transport", "bare")}
        return {
            "in place, GB/s": total / seconds["transport"] / 1e9,
            "gloo alone, GB/s": total / seconds["bare"] / 1e9,
            "of gloo alone, fraction": seconds["bare"] / seconds["transport"],
            "receiver's memory beyond the state, MB": memory["beyond"] / 1e6,
        }


def _case(name: str, mib: int, count: int) -> Case:
    about = f"{mib} MiB in {count} tensors by PGTransport into memory that is there, beside gloo alone"
    return Case(f"transfer-pg-{name}", about, lambda run: _transfer(run, mib, count), target="at least 1.1 of the peer")


CASES = (
    _case("256", 256, 20),
    _case("1024", 1024, 20),
    _case("4096", 4096, 20),
    _case("4096-many", 4096, 4000),
)
