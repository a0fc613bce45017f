"""Ten thousand schedules of faults against the real core, and what a schedule, a run and a search promise."""

from __future__ import annotations

import pytest

from torchft.testing.simulation import (
    STORIES,
    Fault,
    Schedule,
    Settings,
    When,
    generate,
    run,
    run_seed,
    run_seeds,
)
from torchft.testing.simulation.faults import KINDS

SCHEDULES = 10_000
"""Many times as many as it takes to notice that any one rule is missing (test_simulation_rules.py)."""
PART = SCHEDULES // 4
"""What one test runs: several workers share the schedules."""

DANGEROUS = (
    "standing step",
    "lone standing step",
    "prepare",
    "decide",
    "change dropped",
    "released",
    "adoption",
    "adoption in part",
    "takeover",
    "reign",
    "fenced leader",
    "waits for its lease",
    "partial commit",
    "failed step",
    "heal",
    "state lost",
    "answered again",
    "left",
    "begun once more",
    "went on",
)
"""What has to have happened in some of them, or they prove little."""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SCHEDULES, PART))
def test_no_invariant_breaks_in_ten_thousand_schedules(first: int) -> None:
    summary = run_seeds(range(first, first + PART))
    assert [(r.schedule.seed, str(r.violation)) for r in summary.failed] == []
    assert summary.runs == PART
    assert summary.commits > 50 * PART
    assert [what for what in DANGEROUS if summary.saw[what] < 5] == []


def test_the_same_seed_gives_the_same_run() -> None:
    for seed in (3, 14, 15):
        one, other = run(generate(seed), trace=True), run(generate(seed), trace=True)
        assert one.trace is not None
        assert other.trace is not None
        assert one.trace.text() == other.trace.text()
        assert (one.events, one.seen) == (other.events, other.seen)
        untraced = run_seed(seed)
        assert (untraced.events, untraced.seen, untraced.commits) == (one.events, one.seen, one.commits)


def test_schedules_are_of_many_sizes_and_tell_all_stories() -> None:
    schedules = [generate(seed) for seed in range(400)]
    assert {s.settings.replicas for s in schedules} == {2, 3, 4, 5, 6}
    assert {s.settings.lighthouses for s in schedules} == {1, 2, 3}
    assert {s.settings.ranks for s in schedules} == {1, 2}
    assert {s.settings.async_quorum for s in schedules} == {True, False}
    kinds = {fault.kind for s in schedules for fault in s.faults}
    assert kinds == set(KINDS)
    assert {fault.when.point != "" for s in schedules for fault in s.faults} == {True, False}
    assert {s.settings.replicas for s in (generate(seed, (3, 3)) for seed in range(5))} == {3}


@pytest.mark.parametrize("story", STORIES)
def test_each_story_alone_breaks_nothing(story: str) -> None:
    assert [str(r.violation) for r in run_seeds(range(10), (2, 4), [story]).failed] == []


def test_schedule_reads_what_it_wrote() -> None:
    for seed in range(200):
        schedule = generate(seed)
        again = Schedule.parse(schedule.text())
        assert again.settings == schedule.settings
        assert again.text() == schedule.text()
        assert Schedule.parse(again.text()) == again


def test_a_person_writes_a_schedule() -> None:
    schedule = Schedule.parse("""
        # two groups, and a lighthouse that dies
        seed 7
        settings replicas=2 async_quorum=no

        at 1 crash L0 for 0.5           # and comes back
        on first_commit 3 +0.01 kill ~
        at 2 late g0 L0 for 1 by 0.3
    """)
    assert schedule == Schedule(
        7,
        Settings(replicas=2, async_quorum=False),
        (
            Fault(When(1.0), "crash", "L0", seconds=0.5),
            Fault(When(0.01, "first commit", 3), "kill", "~"),
            Fault(When(2.0), "late", "g0", "L0", seconds=1.0, by=0.3),
        ),
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("at 1 explode g0", "no fault 'explode'; there are: crash"),
        ("at soon kill g0", "line 2, 'at soon kill g0': could not convert"),
        ("at 1 cut g0", "cut is of two"),
        ("at 1 kill g0 g1", "kill is of one"),
        ("at 1", "cut short"),
        ("whenever kill g0", "it begins with 'whenever'"),
        ("settings color=red", "'color=red' is not a setting; there are: replicas"),
        ("settings replicas=many", "that is no int"),
        ("seed x", "invalid literal"),
    ],
)
def test_a_line_that_is_none_is_refused_with_the_reason(line: str, says: str) -> None:
    with pytest.raises(ValueError, match="line 2") as error:
        Schedule.parse(f"seed 1\n{line}\n")
    assert says in str(error.value)
    assert "A line is:" in str(error.value)


def test_an_unknown_story_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no story 'comedy'; there are: killed"):
        generate(1, stories=["comedy"])


def test_a_lighthouse_that_is_away_costs_no_step() -> None:
    quiet = run(Schedule(1, Settings(replicas=3), ()))
    away = run(Schedule.parse("seed 1\nsettings replicas=3\nat 2 crash L0 for 3"))
    assert quiet.ok
    assert away.ok
    assert away.seen["failed step"] == quiet.seen["failed step"] == 0
    assert away.seen["adoption"] == 1
    assert away.commits > 0.9 * quiet.commits


def test_a_joiner_costs_the_others_no_step() -> None:
    result = run(Schedule.parse("seed 1\nsettings replicas=2\nat 3 start g2\nat 5 leave g2"))
    assert result.ok
    assert result.seen["failed step"] == 0
    assert (result.seen["fault start"], result.seen["left"]) == (1, 1)


def test_a_trace_tells_who_did_what_and_when() -> None:
    result = run(Schedule.parse("seed 1\nsettings replicas=2\nat 3 kill g1\nat 4 start g1"), trace=True)
    assert result.trace is not None
    lines = [line.split(None, 2) for line in result.trace.text().splitlines()]
    assert ["3.0000", "g1", "is killed"] in lines
    assert any(who == "L0" and what.startswith("tells all: replica g1:1 is no longer there") for _, who, what in lines)
    assert any(who == "g1" and what.startswith("commits step") for at, who, what in lines if float(at) > 4)
    assert result.trace.text(3).splitlines()[0].endswith("lines before")
    assert len(result.trace.text(3).splitlines()) == 4
