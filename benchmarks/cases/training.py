"""What the cases share that do something to groups in training: their start, and their commits as told."""

from __future__ import annotations

import itertools
import time

from benchmarks.processes import CHILDREN, Child, ChildTooSlowError, Cluster, Event, Implementation

__all__ = ["SETTLED", "STEP_MS", "commit_without", "longest_gap", "together", "train"]

STEP_MS = 20.0
"""Simulated compute of a step where a fault or a join is measured."""
SETTLED = 20
"""Steps all groups commit together before something happens to them."""


def train(
    cluster: Cluster, impl: Implementation, replica: int, lighthouse: str, *args: object, name: str | None = None
) -> Child:
    """Starts a group (a rank of it, with the right arguments) that trains until it is told to stop."""
    where: tuple[object, ...] = ("--replica", replica, "--lighthouse", lighthouse)
    if "--step-ms" not in args:
        where = (*where, "--step-ms", STEP_MS)
    return cluster.spawn(impl, CHILDREN / "train.py", *where, *args, name=name or f"group{replica}")


def together(children: list[Child], count: int, timeout: float = 60.0) -> None:
    """Waits until each child has committed ``SETTLED`` steps after the first with ``count`` participants."""
    for child in children:
        first = child.wait("step", timeout, lambda e: e["committed"] and e["participants"] == count)["step"]

        def settled(e: Event, first: int = first) -> bool:
            return bool(e["step"] >= first + SETTLED and e["participants"] == count)

        child.wait("step", timeout, settled)


def commit_without(children: list[Child], at: float, participants: int, patience: float) -> float | None:
    """When the slowest child had its first commit after ``at`` with that many participants.

    None: not all of them within ``patience`` seconds.

    Raises:
        ChildError: one of them died.
    """

    def alone(e: Event) -> bool:
        return bool(e["committed"] and e["participants"] == participants and e["t"] > at)

    try:
        found = [c.wait("step", max(0.0, at + patience - time.monotonic()), alone) for c in children]
    except ChildTooSlowError:
        return None
    return max(float(e["t"]) for e in found)


def longest_gap(child: Child, start: float, end: float) -> float:
    """The longest time between two commits of ``child`` in a row, of those that touch ``[start, end]``."""
    commits: list[float] = [e["t"] for e in child.all("step") if e["committed"]]
    return max((b - a for a, b in itertools.pairwise(commits) if b >= start and a <= end), default=0.0)
