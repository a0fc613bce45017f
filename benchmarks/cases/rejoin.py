"""How long a fresh group takes to join a training one, by the size of the state that it must receive."""

from __future__ import annotations

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import SETTLED, longest_gap, together, train
from benchmarks.processes import Cluster

__all__ = ["CASES"]


def _rejoin(run: Run, mib: int, transport: str) -> Figures:
    if run.quick:
        mib = min(mib, 64)
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl)
        args = ("--state-mb", mib, "--transport", transport)
        survivor = train(cluster, run.impl, 0, lighthouse, *args)
        survivor.hello()
        together([survivor], 1)
        joiner = train(cluster, run.impl, 1, lighthouse, *args)
        joiner.hello()
        asked = joiner.wait("quorum", 60)["t"]
        first = joiner.wait("step", 120, lambda e: e["committed"])
        survivor.wait("step", 60, lambda e: e["committed"] and e["participants"] == 2 and e["t"] > first["t"])
        for child in (survivor, joiner):
            child.tell("stop")
        for child in (survivor, joiner):
            if child.end(90) != 0:
                raise child.error("failed at its end")
        if first["step"] < SETTLED:
            raise RuntimeError(f"the joiner was not healed: its first commit is step {first['step']}")
        return {
            "first quorum call to first commit, s": first["t"] - asked,
            "process spawn to first commit, s": first["t"] - joiner.spawned,
            "survivor's longest gap between commits, s": longest_gap(survivor, asked, first["t"]),
        }


def _rejoin_case(mib: int, transport: str) -> Case:
    about = f"a group joins a training one and receives {mib} MiB of state by {transport}"
    return Case(f"rejoin-{transport}-{mib}", about, lambda run: _rejoin(run, mib, transport))


CASES = tuple(_rejoin_case(mib, transport) for transport in ("http", "pg") for mib in (8, 256, 1024))
