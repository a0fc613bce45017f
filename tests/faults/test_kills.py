"""Replica groups that are killed, at every phase of a step: it costs a step, and nothing else."""

from __future__ import annotations

import pytest

from tests.faults.job import Job, Trainer
from tests.faults.trainer import PHASES


def together(*trainers: Trainer) -> bool:
    """Whether all of them have just committed a step with all of them in it."""
    return all(t.of("step") and t.of("step")[-1]["participants"] == len(trainers) for t in trainers)


def assert_identical(ends: list[dict[str, object]], number: int) -> None:
    assert len(ends) == number
    assert len({e["hash"] for e in ends}) == 1
    assert len({(e["step"], e["batches"]) for e in ends}) == 1


@pytest.mark.parametrize("transport", ["http", "pg"])
def test_a_late_joiner_heals_from_the_live_state_bit_by_bit(job: Job, transport: str) -> None:
    a = job.start("a", "--transport", transport)
    job.until(lambda: a.step >= 10, "ten steps alone")
    b = job.start("b", "--transport", transport)
    job.until(lambda: together(a, b), "training together")
    assert_identical(job.finish(), 2)
    assert not [e for e in a.of("step") if e["error"]], "nobody's step fails because somebody joins"
    healed = [e for e in b.of("step") if e["healed"]]
    assert len(healed) == 1


@pytest.mark.parametrize("phase", PHASES)
def test_a_group_killed_at_any_phase_costs_the_other_a_step_and_heals_again(job: Job, phase: str) -> None:
    a = job.start("a", "--timeout", "8")
    job.until(lambda: a.step >= 3, "the first steps")
    # Sources are taken in the order of their names: a group that is to die as the source sorts before the other.
    name = "B" if phase == "send" else "b"
    victim = job.start(name, "--timeout", "8", "--die", f"{phase}@{0 if phase in ('receive', 'configure') else 8}")
    if phase == "send":
        job.until(lambda: together(a, victim) and victim.step >= 8, "training together")
        job.start("c")
    job.until(lambda: victim.of("dies"), f"the death in {phase}")
    died_at = a.step
    job.until(lambda: a.step >= died_at + 3, "the survivor going on")
    again = job.start(name)
    living = [t for t in job.trainers if t is not victim]
    job.until(lambda: together(*living), "training together again")
    assert again.of("step")
    assert_identical(job.finish(), len(living))


def test_three_groups_go_on_when_one_is_killed_in_the_middle_of_backward(job: Job) -> None:
    a, b = job.start("a"), job.start("b")
    job.until(lambda: together(a, b), "training together")
    victim = job.start("c", "--die", "backward@+10")
    job.until(lambda: victim.of("dies"), "the death")
    job.until(lambda: together(a, b), "the two going on")
    ends = job.finish()
    assert_identical(ends, 2)
    for survivor in (a, b):
        failed = [e for e in survivor.of("step") if e["error"] and e["time"] >= victim.of("dies")[0]["time"] - 0.5]
        assert len(failed) <= 2, failed  # none where it heard of the death before it used the quorum
