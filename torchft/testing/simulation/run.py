"""Runs schedules: one, with its verdict, or thousands, with a summary.

A run begins with all groups at step 0, lets the faults of its schedule happen, starts what they left dead, and goes
on until every live group has committed again, or the bound for that has passed (invariant 6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torchft.testing.simulation.faults import Schedule, install
from torchft.testing.simulation.generate import generate
from torchft.testing.simulation.invariants import Violation
from torchft.testing.simulation.job import Job, Parts
from torchft.testing.simulation.shrink import shrink
from torchft.testing.simulation.trace import Trace

__all__ = ["Result", "Summary", "minimal", "run", "run_seed", "run_seeds"]

_LOOK = 0.5


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    schedule: Schedule
    violation: Violation | None
    seen: Counter[str]
    """How often each thing happened: see :attr:`World.seen`."""
    events: int
    seconds: float
    """Of simulated time."""
    commits: int
    trace: Trace | None = None

    @property
    def ok(self) -> bool:
        return self.violation is None


def run(schedule: Schedule, parts: Parts | None = None, trace: bool = False) -> Result:
    """Runs one schedule.

    Args:
        schedule: what goes wrong.
        parts: the code under test; the real one by default.
        trace: record what happens.
    """
    settings = schedule.settings
    job = Job(settings, schedule.seed, Trace() if trace else None, parts)
    world = job.world
    acts = install(schedule, job)
    job.start()
    world.run(settings.duration)
    while not world.stopped and acts.over > world.now:
        world.run(acts.over)
    if not world.stopped:
        job.make_whole()
        last_fault = world.now
        world.tell("*", "no further faults")
        end = last_fault + settings.recovery_bound
        while not world.stopped and world.now < end:
            world.run(world.now + _LOOK)
            if not job.behind(last_fault):
                break
        behind = [] if world.stopped else job.behind(last_fault)
        if behind:
            what = f"no commit for {world.now - last_fault:.1f} s after the last fault: {', '.join(behind)}"
            job.invariants.broken(6, behind[0], what)
    commits = sum(trainer.commits for trainer in job.trainers())
    return Result(schedule, job.invariants.violation, world.seen, world.events, world.now, commits, world.trace)


def run_seed(
    seed: int, replicas: tuple[int, int] = (2, 6), stories: Sequence[str] = (), parts: Parts | None = None
) -> Result:
    """Runs the schedule of a seed; see :func:`generate`."""
    return run(generate(seed, replicas, stories), parts)


@dataclass
class Summary:
    """Many runs, added up."""

    runs: int = 0
    events: int = 0
    seconds: float = 0.0
    """Of simulated time."""
    commits: int = 0
    saw: Counter[str] = field(default_factory=Counter)
    """In how many runs each thing happened at least once."""
    failed: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """One more run."""
        self.runs += 1
        self.events += result.events
        self.seconds += result.seconds
        self.commits += result.commits
        self.saw.update(result.seen.keys())
        if not result.ok:
            self.failed.append(result)

    def merge(self, other: Summary) -> None:
        """Those of another one as well."""
        self.runs += other.runs
        self.events += other.events
        self.seconds += other.seconds
        self.commits += other.commits
        self.saw.update(other.saw)
        self.failed += other.failed


def run_seeds(
    seeds: Iterable[int], replicas: tuple[int, int] = (2, 6), stories: Sequence[str] = (), parts: Parts | None = None
) -> Summary:
    """Runs the schedules of many seeds."""
    summary = Summary()
    for seed in seeds:
        summary.add(run_seed(seed, replicas, stories, parts))
    return summary


def minimal(failed: Result, parts: Parts | None = None, tries: int = 400) -> Result:
    """The smallest schedule found that breaks the same invariant, run with a trace."""
    assert failed.violation is not None
    invariant = failed.violation.invariant

    def fails(schedule: Schedule) -> bool:
        violation = run(schedule, parts).violation
        return violation is not None and violation.invariant == invariant

    return run(shrink(failed.schedule, fails, tries), parts, trace=True)
