"""How long a fresh group takes to join a training one, by the size of the state that it must receive."""

from __future__ import annotations

import time

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import SETTLED, commit_without, longest_gap, together, train
from benchmarks.processes import Cluster

__all__ = ["CASES"]

PATIENCE = 75.0
"""Longer than every default timeout, which is 60 s."""


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


def _kill_source(run: Run) -> Figures:
    mib = 256 if run.quick else 2048
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl)
        args = ("--state-mb", mib)
        source, survivor = (train(cluster, run.impl, i, lighthouse, *args) for i in range(2))
        for child in (source, survivor):
            child.hello()
        together([source, survivor], 2)
        joiner = train(cluster, run.impl, 2, lighthouse, *args)
        joiner.hello()
        joiner.wait("quorum", 60)
        time.sleep(0.3)  # two gigabytes take longer
        hit = source.kill()  # the first of the names is the source of the only joiner
        if any(e["committed"] for e in joiner.all("step")):
            raise RuntimeError("the heal was over before its source was killed")
        back = commit_without([survivor], hit, 2, PATIENCE)
        alone = commit_without([survivor], hit, 1, 0.0)
        healed = commit_without([joiner], hit, 2, PATIENCE if back else 0.0)
        next_commit = min((t for t in (back, alone) if t), default=None)
        return {
            "kill to the survivor's next commit, s": next_commit and next_commit - hit,
            "kill to the healed group's first commit, s": healed and healed - hit,
        }


CASES = (
    *(_rejoin_case(mib, transport) for transport in ("http", "pg") for mib in (8, 256, 1024)),
    Case(
        "kill-source",
        "the source of a 2 GiB heal gets SIGKILL in the middle of it; two other groups, default settings",
        _kill_source,
        patience=PATIENCE,
        target="1 s",
        most_peer=1,
    ),
)
