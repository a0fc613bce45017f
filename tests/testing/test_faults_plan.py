"""Plans: their text, and that the same seed gives the same schedule."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.testing.faults import KINDS, Fault, Plan, Schedule


def _steps(plan: Plan, steps: list[int], life: int = 0) -> list[tuple[int, str]]:
    schedule = Schedule(plan, life=life)
    return [(step, fault.kind) for step in steps for fault, _ in schedule.due_in(step)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@step=7", Fault("kill", at_step=7)),
        (" stop( 2s ) @ every=30s , seed=4 ", Fault("stop", {"seconds": 2.0}, every=30.0, seed=4)),
        ("hold_gil(20s)@step=3", Fault("hold_gil", {"seconds": 20.0}, at_step=3)),
        ("hold_gil(250ms)@every=10steps", Fault("hold_gil", {"seconds": 0.25}, every_steps=10)),
        ("exit(3)@step=0,life=first", Fault("exit", {"code": 3}, at_step=0, life=0)),
        ("kill@step=7,once=/tmp/x y,who=replica_*", Fault("kill", at_step=7, once="/tmp/x y", who="replica_*")),
        (
            'raise(ValueError, "a, b; (c")@step=1',
            Fault("raise", {"kind": "ValueError", "message": "a, b; (c"}, at_step=1),
        ),
        ("raise(message=now)@step=1", Fault("raise", {"message": "now"}, at_step=1)),
        ("throttle(1MiB)@step=1", Fault("throttle", {"rate": 1 << 20}, at_step=1)),
        ("delay(100ms, 1.5m)@every=1h", Fault("delay", {"by": 0.1, "seconds": 90.0}, every=3600.0)),
        (
            "fill_disk(/data, leave=10MB)@step=1",
            Fault("fill_disk", {"path": "/data", "leave": 10_000_000}, at_step=1),
        ),
    ],
)
def test_text_is_read_and_written(text: str, fault: Fault) -> None:
    plan = Plan.parse(text)
    assert plan.faults == (fault,)
    assert Plan.parse(str(plan)) == plan


def test_a_plan_has_many_faults_or_none() -> None:
    assert [f.kind for f in Plan.parse("kill@step=1; stop@step=2;\n cut@every=3s;").faults] == ["kill", "stop", "cut"]
    assert Plan.parse("  ").faults == ()


@pytest.mark.parametrize(
    ("text", "named", "listed"),
    [
        ("kill@step=1; kil@step=7", "'kil@step=7': there is no kind 'kil'", "hold_gil(seconds)"),
        ("kill", "'kill'", "every=3s"),
        ("kill@", "''", "every=3s"),
        ("kill@step", "'step'", "every=3s"),
        ("kill@step=x", "'step=x'", "every=3s"),
        ("kill@stepp=1", "'stepp=1'", "once=FILE"),
        ("kill@step=1,every=3s", "exactly one", "every=10steps"),
        ("kill@seed=1", "exactly one", "every=10steps"),
        ("kill@step=1,step=2", "'step=2'", "second"),
        ("kill@every=0s", "every 0", "positive"),
        ("kill@every=3 bananas", "'3 bananas'", "2s or 250ms"),
        ("kill(9)@step=1", "'9'", "written kill"),
        ("stop(2s, 3s)@step=1", "'3s'", "stop([seconds])"),
        ("stop(long)@step=1", "'long'", "2s or 250ms"),
        ("stop(time=2s)@step=1", "'time'", "stop([seconds])"),
        ("stop(2s, seconds=2s)@step=1", "'seconds'", "twice"),
        ("stop(2s@step=1", "'stop(2s@step=1'", "bracket"),
        ("hold_gil@step=1", "'seconds'", "hold_gil(seconds)"),
        ("raise(Nonsense)@step=1", "'Nonsense'", "InjectedFault"),
        ("raise(os.path)@step=1", "'os.path'", "InjectedFault"),
        ("raise('x)@step=1", "quote", "raise"),
        ("exit(256)@step=1", "256", "between 0 and 255"),
        ("limit_file_size(1XB)@step=1", "'1XB'", "10MB"),
    ],
)
def test_bad_text_is_refused_with_the_part_and_what_there_is(text: str, named: str, listed: str) -> None:
    with pytest.raises(ValueError, match="in ") as refused:
        Plan.parse(text)
    assert named in str(refused.value)
    assert listed in str(refused.value)


@given(st.text(alphabet="kilstop@=,;()'\" 0123456789sevrym_.", max_size=40))
def test_any_text_is_a_plan_or_a_value_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except ValueError:
        return
    assert Plan.parse(str(plan)) == plan


@given(
    st.sampled_from(sorted(KINDS)),
    st.floats(1e-6, 1e6),
    st.one_of(st.none(), st.integers(0, 2**63)),
    st.one_of(
        st.none(), st.text(st.characters(exclude_characters="'\n\r", codec="ascii", categories=["P", "L"]), min_size=1)
    ),
)
def test_what_is_written_is_read_back(kind: str, every: float, seed: int | None, who: str | None) -> None:
    needed = {"seconds": every, "by": every, "rate": 5, "path": "/a b", "size": 7}
    options = {o.name: needed[o.name] for o in KINDS[kind].options if o.needed}
    fault = Fault(kind, options, every=every, seed=seed, who=who)
    assert Plan.parse(str(fault)).faults == (fault,)


def test_a_step_is_hit_once_and_not_when_it_is_tried_again() -> None:
    plan = Plan.parse("kill@step=2; stop@every=3steps")
    assert _steps(plan, [0, 1, 2, 2, 3, 3, 3, 4, 2, 6, 8, 9]) == [
        (2, "kill"),
        (3, "stop"),
        (6, "stop"),
        (9, "stop"),
    ]


def test_a_step_that_is_jumped_over_is_not_hit() -> None:
    assert _steps(Plan.parse("kill@step=2"), [0, 5, 6]) == []


def test_a_fault_of_the_first_life_is_not_one_of_the_second() -> None:
    plan = Plan.parse("kill@step=1,life=first; stop@step=1")
    assert _steps(plan, [0, 1]) == [(1, "kill"), (1, "stop")]
    assert _steps(plan, [0, 1], life=1) == [(1, "stop")]


def test_the_same_seed_gives_the_same_schedule_in_another_process() -> None:
    text = "kill@every=3s; stop(1s)@every=2s,seed=4"
    here = [(t, f.kind) for t, f in Plan.parse(text, seed=9).times(60.0)]
    code = (
        f"from torchft.testing.faults import Plan; print([(t, f.kind) for t, f in Plan.parse({text!r}, 9).times(60)])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert there.stdout.strip() == str(here)
    assert {kind for _, kind in here} == {"kill", "stop"}
    assert [t for t, _ in here] == sorted(t for t, _ in here)


def test_seed_name_and_life_each_change_the_schedule() -> None:
    plan = Plan.parse("kill@every=3s")
    schedules = [
        plan.times(60.0),
        plan.times(60.0, name="a"),
        plan.times(60.0, life=1),
        [(t, plan.faults[0]) for t, _ in Plan.parse("kill@every=3s", seed=1).times(60.0)],
    ]
    assert all(a != b for i, a in enumerate(schedules) for b in schedules[:i])


def test_a_further_fault_does_not_move_those_before_it() -> None:
    few = Plan.parse("kill@every=3s").times(100.0)
    many = [(t, f) for t, f in Plan.parse("kill@every=3s; stop@every=1s").times(100.0) if f.kind == "kill"]
    assert few == many


def test_a_rate_is_an_average() -> None:
    times = [t for t, _ in Plan.parse("kill@every=3s").times(30_000.0)]
    assert 9_500 < len(times) < 10_500
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) < 0.1
    assert max(gaps) > 15


def test_missed_times_do_not_add_up() -> None:
    schedule = Schedule(Plan.parse("kill@every=1s"))
    assert len(schedule.due_at(1000.0)) == 1
    due = schedule.next_time()
    assert due is not None
    assert due > 1000.0
    assert schedule.due_at(1000.0) == []


def test_a_fault_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="no kind"):
        Fault("nothing", at_step=1)
    with pytest.raises(ValueError, match="no option 'x'"):
        Fault("kill", {"x": 1}, at_step=1)
    with pytest.raises(ValueError, match="exactly one"):
        Fault("kill")
