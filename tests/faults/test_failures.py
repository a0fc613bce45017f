"""Deaths, hangs and departures of whole groups and of ranks: seen at once, and a step is all they cost.

The lighthouse of these jobs has a join timeout of a minute, and the trainers have timeouts of a minute, so nothing
here would end within the tests' deadlines if it waited for one of those.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from tests.faults.job import Job, Trainer
from tests.faults.test_kills import assert_identical, together
from torchft.testing.faults import Link, busy

MINUTE = ("--timeout", "60")
SOON = 45.0
"""Seconds: far more than it takes, less than any timeout."""

Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    jobs: list[Job] = []

    def job(heartbeat_timeout_ms: int = 60_000) -> Job:
        jobs.append(Job(tmp_path, join_timeout_ms=60_000, heartbeat_timeout_ms=heartbeat_timeout_ms))
        return jobs[-1]

    yield job
    for j in jobs:
        j.close()


def start(job: Job, *names: str, args: tuple[str, ...] = ()) -> list[Trainer]:
    """Groups that have just committed a step with all of them in it."""
    trainers = [job.start(name, *MINUTE, *args) for name in names]
    job.until(lambda: together(*trainers), "training together")
    return trainers


def goes_on(job: Job, survivors: list[Trainer], since: float, steps: int = 3) -> None:
    job.until(lambda: all(len(t.commits_after(since)) >= steps for t in survivors), "going on", SOON)


@pytest.mark.parametrize("groups", [2, 3])
def test_a_killed_group_is_not_waited_for(make: Make, groups: int) -> None:
    job = make()
    *survivors, victim = start(job, *"abc"[:groups])
    goes_on(job, survivors, victim.kill())
    for survivor in survivors:
        assert len(survivor.failures()) <= 1, survivor.failures()
    back = job.start(victim.name, *MINUTE)
    job.until(lambda: together(*survivors, back), "training together again")
    assert_identical(job.finish(), groups)


def test_a_group_whose_forked_children_live_on_is_seen_to_die(make: Make) -> None:
    job = make()
    a, b = start(job, "a", "b", args=("--fork", "2"))
    job.until(lambda: len(b.of("forked")) == 2, "the forks")
    goes_on(job, [a], b.kill())
    for forked in b.of("forked"):
        os.kill(forked["pid"], 0)  # they live
    assert_identical(job.finish(), 1)


def test_a_stopped_group_is_left_behind_after_the_heartbeat_timeout_and_heals_when_it_goes_on(make: Make) -> None:
    job = make(heartbeat_timeout_ms=1000)
    a, b = start(job, "a", "b")
    stopped = b.signal(signal.SIGSTOP)
    goes_on(job, [a], stopped)
    assert "is no longer there: no heartbeat for" in a.log
    assert len(a.failures()) <= 1, a.failures()
    continued = b.signal(signal.SIGCONT)
    job.until(lambda: b.commits_after(continued) and together(a, b), "training together again", SOON)
    assert_identical(job.finish(), 2)


def test_a_source_that_stops_in_mid_transfer_is_exchanged_for_another(make: Make) -> None:
    job = make(heartbeat_timeout_ms=1000)
    # 'a' is asked first: it is the source of whoever comes third. It stops as it begins to send.
    a, b = start(job, "a", "b", args=("--state-mb", "64"))
    stopper = job.start("0", *MINUTE, "--state-mb", "64", "--die", "send@0", "--stop-instead")
    job.until(lambda: together(a, b, stopper), "training together")
    joiner = job.start("c", *MINUTE, "--state-mb", "64")
    job.until(lambda: stopper.of("dies"), "the stop of the source")
    at = time.time()
    goes_on(job, [a, b, joiner], at)
    stopper.kill()
    assert_identical(job.finish(), 3)


def test_a_source_that_is_killed_when_half_of_the_state_has_left_it_is_not_waited_for(make: Make) -> None:
    job = make()
    options = ("--transport", "default", "--state-mb", "64")
    a, b = start(job, "a", "b", args=options)
    source = job.start("0", *MINUTE, *options, "--die", "half@0")  # it is asked first
    job.until(lambda: together(a, b, source), "training together")
    joiner = job.start("c", *MINUTE, *options)
    job.until(lambda: source.of("dies"), "the death of the source")
    goes_on(job, [a, b, joiner], source.of("dies")[0]["time"])
    for survivor in (a, b):
        assert len(survivor.failures()) <= 1, survivor.failures()
    assert "received step" in joiner.log
    assert_identical(job.finish(), 3)


def test_a_group_that_stops_while_the_process_group_is_built_does_not_hold_the_others(make: Make) -> None:
    job = make(heartbeat_timeout_ms=1000)
    a, b = start(job, "a", "b")
    stopper = job.start("c", *MINUTE, "--die", "configure@0", "--stop-instead")
    job.until(lambda: stopper.of("dies"), "the stop of the joiner")
    goes_on(job, [a, b], time.time())
    stopper.kill()
    assert_identical(job.finish(), 2)


@pytest.mark.slow
def test_a_group_that_holds_its_gil_for_twenty_seconds_is_waited_for(make: Make, tmp_path: Path) -> None:
    job = make(heartbeat_timeout_ms=1000)
    (a,) = start(job, "a")  # first, or b would meet its fault alone
    b = job.start("b", *MINUTE, "--faults", f"hold_gil(20s)@every=20steps,once={tmp_path}/held")

    def waited() -> bool:
        times = [e["time"] for e in a.of("step")]
        return any(after - before > 18 for before, after in itertools.pairwise(times))

    job.until(lambda: waited() and together(a, b), "going on together after the wait", 150)
    assert not a.failures() + b.failures()
    assert_identical(job.finish(), 2)


@pytest.mark.slow
def test_groups_on_a_machine_under_full_load_are_not_taken_for_dead(make: Make) -> None:
    job = make(heartbeat_timeout_ms=1000)
    a, b = start(job, "a", "b")
    with busy(6):
        since = time.time()
        job.until(lambda: time.time() - since > 5, "five heartbeat timeouts under load", 60)
    assert not a.failures() + b.failures()
    assert_identical(job.finish(), 2)


def test_a_dead_rank_ends_its_group_by_name_and_costs_the_others_a_step(make: Make) -> None:
    job = make()
    a = job.start_group("a", 2, *MINUTE)
    b = job.start_group("b", 2, *MINUTE)
    job.until(lambda: all(t.newest["participants"] == 2 for t in [*a, *b]), "training together")
    killed = b[1].kill()
    goes_on(job, a, killed)
    named = "rank 1 of this group is no longer there"
    job.until(lambda: any(named in error for error in b[0].failures()), "the group's other rank naming the dead", SOON)
    for rank in a:
        assert len([f for f in rank.failures() if f]) <= 1, rank.failures()
    b[0].kill()  # as torchrun does
    again = job.start_group("b", 2, *MINUTE)
    job.until(lambda: all(t.newest["participants"] == 2 for t in [*a, *again]), "training together again")
    ends = job.finish()
    hashes = [e["hash"] for e in ends]
    assert hashes[:2] == hashes[2:], "each rank has what the same rank of the other group has"


def test_a_dead_rank_0_ends_its_group_too(make: Make) -> None:
    job = make()
    a, b = job.start_group("a", 2, *MINUTE), job.start_group("b", 2, *MINUTE)
    job.until(lambda: all(t.newest["participants"] == 2 for t in (*a, *b)), "training together")
    goes_on(job, a, b[0].kill())
    job.until(lambda: any("rank 0" in e or "not reachable" in e for e in b[1].failures()), "rank 1 noticing", SOON)


def test_who_leaves_between_two_steps_costs_the_others_at_most_the_one_they_have_begun(make: Make) -> None:
    job = make()
    a, b = start(job, "a", "b")
    c = job.start("c", *MINUTE, "--leave", str(a.step + 15))
    job.until(lambda: c.of("left"), "the departure")
    left = c.of("left")[0]["time"]
    goes_on(job, [a, b], left)
    for trainer in (a, b):
        failed = [e for e in trainer.of("step") if e["error"]]
        assert len(failed) <= 1, failed
        assert all(e["time"] > left - 1 for e in failed), "nobody's step fails because somebody joins"
    c.kill()
    assert_identical(job.finish(), 2)


def test_sigterm_with_drain_ends_a_group_between_two_steps_with_code_0(make: Make) -> None:
    job = make()
    (a,) = start(job, "a", args=("--drain",))
    b = job.start("b", *MINUTE, "--drain", program=Popen)
    job.until(lambda: together(a, b), "training together")
    told = b.signal(signal.SIGTERM)
    assert b.process.wait(timeout=SOON) == 0
    goes_on(job, [a], told)
    assert not a.failures() + b.failures()
    assert "drained on SIGTERM" in a.log
    assert_identical(job.finish(), 1)


def test_an_exception_in_the_loop_is_told_to_the_others(make: Make) -> None:
    job = make()
    (a,) = start(job, "a")
    b = job.start("b", *MINUTE, "--faults", "raise@every=20steps", program=Popen)
    b.exits.add(1)
    job.until(lambda: b.process.poll() == 1, "the exception")
    at = b.newest["time"]
    goes_on(job, [a], at)
    assert "it left: InjectedFault" in a.log
    assert_identical(job.finish(), 1)


def test_a_group_that_hangs_alive_is_left_behind_after_the_collectives_timeout(make: Make) -> None:
    job = make(heartbeat_timeout_ms=1000)
    a = job.start("a", "--timeout", "4")
    b = job.start("b", "--timeout", "60", "--hang-at", "20")
    job.until(lambda: b.of("hangs"), "the hang")
    goes_on(job, [a], b.of("hangs")[0]["time"])
    assert any("hangs" in line for line in a.log.splitlines() if "is no longer there" in line), a.log[-3000:]
    b.kill()
    assert_identical(job.finish(), 1)


@pytest.mark.slow
def test_faults_at_random_times_lose_steps_and_never_the_state(make: Make) -> None:
    job = make(heartbeat_timeout_ms=1000)
    generator = random.Random(7)
    names = ["a", "b", "c"]
    alive = dict(zip(names, start(job, *names), strict=True))
    for fault in generator.sample(["kill", "kill", "kill", "stop", "stop", "exit"], 6):
        name = generator.choice(names)
        others = [t for n, t in alive.items() if n != name]
        target = max(t.step for t in others) + generator.randint(1, 30)
        job.until(lambda o=others, s=target: max(t.step for t in o) >= s, "some steps")
        victim = alive[name]
        if fault == "stop":
            at = victim.signal(signal.SIGSTOP)
            goes_on(job, others, at)
            victim.signal(signal.SIGCONT)
        else:
            victim.exits.add(-signal.SIGTERM)
            at = victim.kill() if fault == "kill" else victim.signal(signal.SIGTERM)
            goes_on(job, others, at)
            alive[name] = job.start(name, *MINUTE)
        job.until(lambda: together(*alive.values()), f"{name} back in after {fault}")
    assert_identical(job.finish(), 3)


def test_a_lighthouse_connection_that_is_cut_again_and_again_costs_no_step(make: Make) -> None:
    job = make(heartbeat_timeout_ms=5000)
    a = job.start("a", *MINUTE)
    with Link(job.lighthouse.address().removeprefix("http://")) as link:
        b = job.start("b", *MINUTE, "--quorum-retries", "20", TORCHFT_LIGHTHOUSE=f"http://{link.address}")
        job.until(lambda: together(a, b), "training together")
        for _ in range(5):
            link.cut()
            at = time.time()
            goes_on(job, [a, b], at)
    assert "counts as dead" not in a.log
    assert "is no longer there" not in a.log
    assert not a.failures() + b.failures()
