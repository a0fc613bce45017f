"""Fault after fault on three groups: how much of the job's progress is left.

Rules:

- Both implementations get the same faults at the same times, drawn by the run's number.
- A group that ends is started again at once, as a supervisor does. One that was told to end and has not done so
  after `GRACE` is killed first.
- Progress is the steps that the job committed, by however many groups, and the batches in them: one a participant.
  The undisturbed rate is taken in the same run, just before the first fault; the fraction is what was committed over
  what that rate gives in the same time with all groups. Where groups share few cores a job with fewer of them steps
  faster, so the fraction of steps can be above 1; that of batches tells what was done.
- The last group that holds the job's state is spared: what would end it hits the next group instead. Without a
  checkpoint on disk all would begin at step 0 again, with any implementation.
- A gap of a group is between two of its commits, from its first quorum call to its first commit, or from its last
  commit to its end; time in which it was itself stopped by the fault does not count.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field
from functools import partial

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import together, train
from benchmarks.processes import Child, ChildError, ChildTooSlowError, Cluster

__all__ = ["CASES"]

GROUPS = 3
STEP_MS = 50.0
GRACE = 2.5
PATIENCE = 75.0
KINDS = ("kill", "stop", "raise", "leave")
AFTER = 20
"""Steps between the order to end and the end, so that every group hears it before."""


@dataclass
class Life:
    """One process of a group: from its start to its end or the end of the run."""

    child: Child
    ended: float | None = None
    stopped: list[tuple[float, float]] = field(default_factory=list)

    def commits(self) -> list[tuple[float, int]]:
        return [(e["t"], int(e["step"])) for e in self.child.all("step") if e["committed"]]

    def gaps(self, start: float, end: float) -> list[float]:
        """The times without a commit of this process, of those that touch ``[start, end]``."""
        asked = self.child.all("quorum")
        if not asked:
            return []
        marks = [asked[0]["t"], *(t for t, _ in self.commits()), self.ended or time.monotonic()]
        return [
            b - a - sum(max(0.0, min(b, to) - max(a, since)) for since, to in self.stopped)
            for a, b in itertools.pairwise(marks)
            if b >= start and a <= end
        ]


class Job:
    """Three groups that are started again whenever they end."""

    def __init__(self, cluster: Cluster, run: Run, lighthouse: str) -> None:
        self._cluster = cluster
        self._run = run
        self._lighthouse = lighthouse
        self.lives: list[list[Life]] = [[] for _ in range(GROUPS)]
        self._ending: dict[int, float] = {}
        self.crashed = 0
        for group in range(GROUPS):
            self._start(group)

    def _start(self, group: int) -> None:
        child = train(self._cluster, self._run.impl, group, self._lighthouse, "--step-ms", STEP_MS)
        self.lives[group].append(Life(child))

    @property
    def running(self) -> list[Child]:
        return [lives[-1].child for lives in self.lives]

    def committed(self, since: float, until: float) -> dict[int, int]:
        """The steps that any group committed in that time, with how many participants."""
        every = (e for lives in self.lives for life in lives for e in life.child.all("step"))
        return {int(e["step"]): int(e["participants"]) for e in every if e["committed"] and since <= e["t"] <= until}

    def _holds_state(self, group: int) -> bool:
        life = self.lives[group][-1]
        return group not in self._ending and life.child.alive() and bool(life.commits())

    def spare(self, group: int) -> int:
        """That group, or the next one where it is the last that holds the state."""
        others = [g for g in range(GROUPS) if g != group]
        return group if any(self._holds_state(g) for g in others) else (group + 1) % GROUPS

    def hit(self, group: int, kind: str, seconds: float) -> None:
        """Does it to the group as it is now, be it training or just starting."""
        life = self.lives[group][-1]
        if kind == "stop":
            since = life.child.pause()
            self.wait_until(since + seconds)
            life.stopped.append((since, life.child.resume()))
        elif kind == "kill":
            self._kill(group)
        elif group not in self._ending:
            life.child.tell(kind)
            self._ending[group] = time.monotonic() + GRACE

    def _kill(self, group: int) -> None:
        self._ending.pop(group, None)
        self.lives[group][-1].ended = self.lives[group][-1].child.kill()
        self._start(group)

    def wait_until(self, end: float) -> None:
        """Passes the time; starts again whoever has ended, told to or not.

        Raises:
            ChildError: a group ended before it had asked for its first quorum.
        """
        while True:
            now = time.monotonic()
            for group, lives in enumerate(self.lives):
                child = lives[-1].child
                if not child.alive():
                    child.end(10)  # all that it said is read
                    if not child.all("quorum"):
                        raise child.error("could not start")
                    self.crashed += group not in self._ending
                    self._ending.pop(group, None)
                    lives[-1].ended = now
                    self._start(group)
                elif now > self._ending.get(group, now):
                    self._kill(group)
            if now >= end:
                return
            time.sleep(min(0.02, end - now))  # a supervisor's look at its processes

    def undisturbed(self, seconds: float) -> float:
        """Steps a second, measured now."""
        start = time.monotonic()
        self.wait_until(start + seconds)
        commits = [c for c in self.lives[0][-1].commits() if c[0] >= start]
        if len(commits) < 2:
            raise RuntimeError("no progress although nothing happened")
        return (commits[-1][1] - commits[0][1]) / (commits[-1][0] - commits[0][0])

    def longest_gap(self, start: float, end: float) -> float:
        return max((g for lives in self.lives for life in lives for g in life.gaps(start, end)), default=0.0)

    def finish(self, faults_end: float) -> Figures:
        """Waits until all train together, ends them at one step and compares their states."""
        back, distinct = "last fault to all training together, s", "different final states less one, count"
        try:
            together(self.running, GROUPS, PATIENCE)
            seconds = time.monotonic() - faults_end
            target = max(int(child.all("step")[-1]["step"]) for child in self.running) + AFTER
            for child in self.running:
                child.tell(f"until {target}")
            ends = [child.wait("end", PATIENCE) for child in self.running]
        except ChildError as e:
            if self._run.ours and not isinstance(e, ChildTooSlowError):
                raise
            return {back: None, distinct: None}
        for child in self.running:
            child.tell("stop")
        return {back: seconds, distinct: float(len({(e["step"], e["hash"]) for e in ends}) - 1)}


def _start(cluster: Cluster, run: Run, join_timeout_ms: int | None) -> Job:
    args = () if join_timeout_ms is None else ("--join_timeout_ms", join_timeout_ms)
    job = Job(cluster, run, cluster.lighthouse_command(run.impl, *args))
    for child in job.running:
        child.hello()
    together(job.running, GROUPS, 90)
    return job


def _kept(job: Job, start: float, seconds: float, rate: float) -> Figures:
    """Progress from ``start`` on. None at all, where a group began anew from the first step meanwhile."""
    before = max(job.committed(0, start))
    firsts = [c[0] for lives in job.lives for life in lives if (c := life.commits())]
    lost = sum(t > start and step < before for t, step in firsts)
    done = {} if lost else {s: n for s, n in job.committed(start, start + seconds).items() if s > before}
    return {
        "committed, steps": float(len(done)),
        "of undisturbed steps, fraction": len(done) / (rate * seconds),
        "of undisturbed batches, fraction": sum(done.values()) / (rate * seconds * GROUPS),
        "longest gap of a living group, s": job.longest_gap(start, start + seconds),
        "groups that began anew at step 0, count": float(lost),
        "groups that ended untold, count": float(job.crashed),
    }


def kills(run: Run, every: float = 5.0) -> Figures:
    """Three groups with a lighthouse of the command's own defaults; one is killed every few seconds."""
    seconds, calm = (20.0, 4.0) if run.quick else (40.0, 10.0)
    rng = random.Random(f"kills {run.index}")
    with Cluster() as cluster:
        job = _start(cluster, run, None)
        rate = job.undisturbed(calm)
        start = time.monotonic()
        for i in range(int(seconds / every)):
            group = rng.randrange(GROUPS)
            job.wait_until(start + i * every)
            job.hit(job.spare(group), "kill", 0.0)
        job.wait_until(start + seconds)
        return _kept(job, start, seconds, rate)


def soak(run: Run, join_timeout_ms: int | None = None, every: float = 3.0) -> Figures:
    """An hour's faults in three minutes: one of four kinds every three seconds."""
    seconds, calm = (30.0, 4.0) if run.quick else (180.0, 10.0)
    rng = random.Random(f"soak {run.index}")
    with Cluster() as cluster:
        job = _start(cluster, run, join_timeout_ms)
        rate = job.undisturbed(calm)
        start = time.monotonic()
        for i in range(int(seconds / every)):
            group, kind, stop = rng.randrange(GROUPS), rng.choice(KINDS), rng.uniform(0.5, 2.0)
            job.wait_until(start + i * every)
            job.hit(group if kind == "stop" else job.spare(group), kind, stop)
        job.wait_until(start + seconds)
        figures = _kept(job, start, seconds, rate)
        try:
            return figures | job.finish(start + seconds)
        except ChildError as e:
            raise RuntimeError(f"{e}\nuntil then: {figures}") from e


CASES = (
    Case(
        "kills-5s",
        "one of three groups is killed every 5 s for 40 s; torchft_lighthouse with its defaults",
        kills,
        patience=PATIENCE,
        most=3,
    ),
    Case(
        "soak",
        "a random fault every 3 s for 180 s on three groups; torchft_lighthouse with its defaults",
        soak,
        patience=PATIENCE,
        most=1,
    ),
    Case(
        "soak-join100",
        "the same, lighthouse with join_timeout_ms=100",
        partial(soak, join_timeout_ms=100),
        patience=PATIENCE,
        most=1,
    ),
)
