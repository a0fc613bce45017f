"""What is measured. Each function runs one case once with one implementation and returns its figures by name.

A figure's name ends in its unit (`ms`, `s`, `GB/s`); figures in GB/s are better when larger, all others when smaller.
Every case starts its own processes and ends them, so the order of cases is free and runs can alternate.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.processes import CHILDREN, Child, Cluster, Event, Implementation

__all__ = ["CASES", "Case", "Figures", "Run"]

Figures = dict[str, float]

STEP_MS = 20.0
"""Simulated compute of a step where a kill or a join is measured."""
SETTLED = 20
"""Steps all groups commit together before something happens to them."""


@dataclass(frozen=True)
class Run:
    """One run of a case: with what, which time (it seeds the moment of a kill), and whether only to try it out."""

    impl: Implementation
    index: int
    quick: bool


@dataclass(frozen=True)
class Case:
    """A case by name; ``plain`` marks the yardstick, which is run once for both implementations."""

    name: str
    about: str
    measure: Callable[[Run], Figures]
    plain: bool = False


def _steps(run: Run, *flags: str) -> list[Event]:
    steps, warmup = (100, 20) if run.quick else (1000, 100)
    with Cluster() as cluster:
        where: tuple[object, ...] = ("--rendezvous", cluster.folder / "rendezvous")
        if "--plain" not in flags:
            where = ("--lighthouse", cluster.lighthouse(run.impl, min_replicas=2))
        children = [
            cluster.spawn(
                run.impl, CHILDREN / "steps.py", "--replica", i, "--steps", steps, "--warmup", warmup, *where, *flags
            )
            for i in range(2)
        ]
        for child in children:
            child.hello()
        results = [child.wait("result", 120) for child in children]
        for child in children:
            child.tell("stop")
        for child in children:
            if child.end(90) != 0:
                raise child.error("failed at its end")
    return results


def _step_figures(results: list[Event]) -> Figures:
    seconds = [s for r in results for s in r["steps"]]
    figures = {
        "step mean, ms": 1e3 * statistics.fmean(seconds),
        "step median, ms": 1e3 * statistics.median(seconds),
        "step p99, ms": 1e3 * statistics.quantiles(seconds, n=100)[98],
        "processor time of a step, ms": 1e3 * statistics.fmean(r["cpu"] / len(r["steps"]) for r in results),
    }
    for part in ("quorum", "commit"):
        if results[0][part]:
            figures[f"{part} median, ms"] = 1e3 * statistics.median(s for r in results for s in r[part])
    for r in results:
        if r["committed"] != len(r["steps"]):
            raise RuntimeError(f"only {r['committed']} of {len(r['steps'])} steps committed")
    return figures


def step_plain(run: Run) -> Figures:
    return _step_figures(_steps(run, "--plain"))


def step_async(run: Run) -> Figures:
    return _step_figures(_steps(run))


def step_sync(run: Run) -> Figures:
    return _step_figures(_steps(run, "--sync"))


def _train(cluster: Cluster, impl: Implementation, replica: int, lighthouse: str, *args: object) -> Child:
    where = ("--replica", replica, "--lighthouse", lighthouse, "--step-ms", STEP_MS)
    return cluster.spawn(impl, CHILDREN / "train.py", *where, *args, name=f"group{replica}")


def _together(children: list[Child], count: int, timeout: float = 60.0) -> None:
    """Waits until each child has committed ``SETTLED`` steps after the first with ``count`` participants."""
    for child in children:
        first = child.wait("step", timeout, lambda e: e["committed"] and e["participants"] == count)["step"]

        def settled(e: Event, first: int = first) -> bool:
            return bool(e["step"] >= first + SETTLED and e["participants"] == count)

        child.wait("step", timeout, settled)


def _longest_gap(child: Child, start: float, end: float) -> float:
    """The longest time between two commits of ``child`` in a row, of those that touch ``[start, end]``."""
    commits: list[float] = [e["t"] for e in child.all("step") if e["committed"]]
    return max(b - a for a, b in itertools.pairwise(commits) if b >= start and a <= end)


def _kill(run: Run, groups: int, join_timeout_ms: int, *args: object) -> Figures:
    rng = random.Random(f"{groups} {run.index}")
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl, join_timeout_ms=join_timeout_ms)
        children = [_train(cluster, run.impl, i, lighthouse, *args) for i in range(groups)]
        for child in children:
            child.hello()
        _together(children, groups)
        victim = children.pop(rng.randrange(groups))
        time.sleep(rng.uniform(0, 2 * STEP_MS / 1e3))
        killed = victim.kill()
        back = [
            c.wait("step", 90, lambda e: e["committed"] and e["participants"] == groups - 1 and e["t"] > killed)
            for c in children
        ]
        # A step more, so that the gap that holds the kill is closed for every child.
        gap = max(_longest_gap(c, killed, e["t"]) for c, e in zip(children, back, strict=True))
        return {
            "kill to commit without the dead, s": max(e["t"] for e in back) - killed,
            "longest gap between commits, s": gap,
        }


def _rejoin(run: Run, mib: int, transport: str) -> Figures:
    if run.quick:
        mib = min(mib, 64)
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl)
        args = ("--state-mb", mib, "--transport", transport)
        survivor = _train(cluster, run.impl, 0, lighthouse, *args)
        survivor.hello()
        _together([survivor], 1)
        joiner = _train(cluster, run.impl, 1, lighthouse, *args)
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
            "survivor's longest gap between commits, s": _longest_gap(survivor, asked, first["t"]),
        }


def _rejoin_case(mib: int, transport: str) -> Case:
    about = f"a group joins a training one and receives {mib} MiB of state by {transport}"
    return Case(f"rejoin-{transport}-{mib}", about, lambda run: _rejoin(run, mib, transport))


CASES = (
    Case("step-plain", "a step of plain DDP over gloo, two processes", step_plain, plain=True),
    Case("step-async", "a step of two groups, async quorum", step_async),
    Case("step-sync", "a step of two groups, sync quorum", step_sync),
    Case("kill-2", "one of two groups is killed", lambda run: _kill(run, 2, 60_000)),
    Case("kill-2-ddp", "the same, training with DistributedDataParallel", lambda run: _kill(run, 2, 60_000, "--ddp")),
    Case("kill-3", "one of three groups is killed", lambda run: _kill(run, 3, 60_000)),
    Case("kill-3-join100", "the same, lighthouse with join_timeout_ms=100", lambda run: _kill(run, 3, 100)),
    *(_rejoin_case(mib, transport) for transport in ("http", "pg") for mib in (8, 256, 1024)),
)
