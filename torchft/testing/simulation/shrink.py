"""Makes a schedule that fails as small as it can be, so that a person can see why.

The idea
    Delta debugging (Zeller and Hildebrandt 2002, *Simplifying and Isolating Failure-Inducing Input*): take away
    faults, halves first, then single ones, as long as the same invariant still breaks. Then make what is left
    simpler: fewer replicas, shorter or rounder times, plain settings.

A simpler run is another run, in which chance falls differently. So each step is tried with a few seeds, and what is
found is always a schedule that was seen to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torchft.testing.simulation.faults import Fault, Schedule
from torchft.testing.simulation.settings import Settings

__all__ = ["shrink"]

_SEEDS = 3
"""Further seeds that each simpler schedule is tried with."""


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], tries: int = 400) -> Schedule:
    """The smallest schedule found that fails like this one.

    Args:
        schedule: which fails.
        fails: whether a schedule fails in the same way.
        tries: calls of ``fails`` at most.
    """
    left = [tries]

    def attempt(candidate: Schedule) -> Schedule | None:
        for more in range(1 + _SEEDS):
            if left[0] <= 0:
                return None
            left[0] -= 1
            seeded = replace(candidate, seed=schedule.seed + more)
            if fails(seeded):
                return seeded
        return None

    best = schedule
    while left[0] > 0:
        smaller = _fewer(best, attempt)
        for candidate in _simpler(smaller):
            found = attempt(candidate)
            if found is not None:
                smaller = found
                break
        if smaller == best:
            return best
        best = smaller
    return best


def _fewer(schedule: Schedule, attempt: Callable[[Schedule], Schedule | None]) -> Schedule:
    """Without faults that are not needed."""
    best = schedule
    size = len(best.faults)
    while size > 0:
        start = 0
        while start < len(best.faults):
            rest = best.faults[:start] + best.faults[start + size :]
            found = attempt(replace(best, faults=rest))
            if found is None:
                start += size
            else:
                best = found
        size //= 2
    return best


def _simpler(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules that are a little easier to understand."""
    settings = schedule.settings
    used = {name.partition("/")[0] for f in schedule.faults for name in (f.who, f.other)}
    last = f"g{settings.replicas - 1}"
    if settings.replicas > 1 and last not in used:
        yield replace(schedule, settings=replace(settings, replicas=settings.replicas - 1))
    plain = Settings()
    for simpler in (
        replace(settings, ranks=plain.ranks),
        replace(settings, lighthouses=plain.lighthouses),
        replace(settings, min_replica_size=plain.min_replica_size),
        replace(settings, min_replicas=plain.min_replicas),
        replace(settings, fixed_with_spares=plain.fixed_with_spares),
        replace(settings, async_quorum=plain.async_quorum),
        replace(settings, init_sync=plain.init_sync),
        replace(settings, drift=0.0),
    ):
        if simpler != settings:
            yield replace(schedule, settings=simpler)
    for i, fault in enumerate(schedule.faults):
        for rounded in _rounder(fault):
            yield replace(schedule, faults=(*schedule.faults[:i], rounded, *schedule.faults[i + 1 :]))


def _rounder(fault: Fault) -> Iterator[Fault]:
    at = _round(fault.when.at, zero=True)
    if at is not None:
        yield replace(fault, when=replace(fault.when, at=at))
    seconds = _round(fault.seconds, zero=False)
    if seconds is not None:
        yield replace(fault, seconds=seconds)
    by = _round(fault.by, zero=False)
    if by is not None:
        yield replace(fault, by=by)


def _round(value: float, zero: bool) -> float | None:
    """The roundest number near by that is another one."""
    for digits in (0, 1):
        rounded = round(value, digits)
        if rounded == value:
            return None
        if rounded > 0 or zero:
            return rounded
    return None
