"""How long a fresh group takes to join a training one, by the size of the state that it must receive."""

from __future__ import annotations

import itertools
import statistics
import time

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import SETTLED, commit_without, longest_gap, together, train
from benchmarks.processes import Child, Cluster

__all__ = ["CASES"]

PATIENCE = 75.0
"""Longer than every default timeout, which is 60 s."""
_MIDDLE = 0.1
"""Seconds after its source was asked for it at which 2 GiB are on their way."""


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


def _slow_joiner(run: Run) -> Figures:
    """A group joins whose state comes at 1 MB/s: what the others feel of it."""
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl)
        args = ("--state-mb", 64 if run.quick else 256, "--link", "--timeout", 20)
        others = [train(cluster, run.impl, i, lighthouse, *args) for i in range(2)]
        for child in others:
            child.hello()
        together(others, 2)
        since = time.monotonic()
        _train_on(others, 5 * SETTLED)
        alone = since, time.monotonic()
        for child in others:
            child.tell("limit 500000")
        joiner = train(cluster, run.impl, 2, lighthouse, *args)
        joiner.hello()
        asked = joiner.wait("quorum", 60)["t"]
        tried = joiner.wait("step", 60)["t"]
        _train_on(others, 2)
        since = time.monotonic()
        _train_on(others, 5 * SETTLED)
        waiting = since, time.monotonic()
        if any(e["committed"] for e in joiner.all("step")):
            raise RuntimeError("the joiner healed although its state came at 1 MB/s")
        for child in others:
            child.tell("limit 0")
        faster = time.monotonic()
        healed = joiner.wait("step", 60, lambda e: e["committed"])["t"]

        def longest(span: tuple[float, float]) -> float:
            return max(longest_gap(child, *span) for child in others)

        def median(span: tuple[float, float]) -> float:
            times = [e["t"] for e in others[0].all("step") if span[0] <= e["t"] <= span[1]]
            return statistics.median(b - a for a, b in itertools.pairwise(times))

        return {
            "others' longest gap between commits before, s": longest(alone),
            "in the step of the first try, s": longest((asked, tried)),
            "while the joiner waits, s": longest(waiting),
            "others' median step before, s": median(alone),
            "while the joiner waits (median), s": median(waiting),
            "limit lifted to healed, s": healed - faster,
        }


def _slow_heal(run: Run, sources: int) -> Figures:
    """A group joins whose state comes at 3 MB/s from each source, and is healed all the same."""
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl)
        args = ("--state-mb", 8 if run.quick else 16, "--link")
        others = [train(cluster, run.impl, i, lighthouse, *args) for i in range(sources)]
        for child in others:
            child.hello()
        together(others, sources)
        for child in others:
            child.tell("limit 3000000")
        joiner = train(cluster, run.impl, sources, lighthouse, *args)
        joiner.hello()
        asked = joiner.wait("quorum", 60)["t"]
        healed = joiner.wait("step", 280, lambda e: e["committed"])["t"]
        _train_on(others, 2)  # their commit of that step may be a moment later
        times = [e["t"] for e in others[0].all("step") if e["committed"] and e["t"] >= asked]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return {
            "first quorum call to first commit, s": healed - asked,
            "others' longest gap between commits, s": max(gaps),
            "all their gaps of a second or more together, s": sum(gap for gap in gaps if gap >= 1.0),
        }


def _train_on(children: list[Child], steps: int) -> None:
    goals = [child.all("step")[-1]["step"] + steps for child in children]
    for child, goal in zip(children, goals, strict=True):
        child.wait("step", 60, lambda e, goal=goal: e["step"] >= goal)


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
        asked = joiner.wait("quorum", 60)["t"]
        source.wait("state", 60, lambda e: e["t"] > asked)
        time.sleep(_MIDDLE)
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
    Case(
        "slow-joiner",
        "a third group joins whose 256 MiB of state come at 1 MB/s, timeout 20 s: what the others feel of it",
        _slow_joiner,
        only_ours=True,
    ),
    *(
        Case(
            f"slow-heal-{sources}",
            f"a group joins whose 16 MiB of state come at 3 MB/s from {word}, and is healed all the same",
            lambda run, sources=sources: _slow_heal(run, sources),
            only_ours=True,
        )
        for sources, word in ((1, "one source"), (2, "each of two sources"))
    ),
)
