"""Timeouts that contradict each other are refused with the reason; suggested ones never do."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.groups import Groups, running
from torchft.cli.lighthouse import lighthouse
from torchft.process_group import ProcessGroupGloo
from torchft.runtime.deadline import LONGEST
from torchft.testing.wait import wait_until
from torchft.timeouts import Timeouts, effective, suggest


def s(value: float) -> timedelta:
    return timedelta(seconds=value)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"collective": s(10), "commit": s(5)}, r"commit \(5 s\) is shorter than collective \(10 s\)"),
        ({"quorum": s(5)}, r"quorum \(5 s\) is not longer than the lighthouse's heartbeat_timeout \(5 s\)"),
        ({"join_timeout": s(61)}, r"quorum \(60 s\) is shorter than the lighthouse's join_timeout \(61 s\)"),
        ({"heartbeat_interval": s(3)}, "one late heartbeat would count as a death"),
        ({"connect": s(0)}, "connect is 0 s: a timeout must be positive"),
        ({"join_timeout": s(-1)}, "must not be negative"),
    ],
)
def test_contradictory_timeouts_are_refused_with_the_reason(given_: dict[str, timedelta], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Timeouts(**given_)


def test_what_no_clock_can_wait_for_is_cut_to_what_one_can() -> None:
    never = Timeouts(collective=timedelta.max, commit=timedelta.max, quorum=timedelta(days=10_000))
    assert never.collective == never.commit == never.quorum == Timeouts(collective=LONGEST).commit == LONGEST


def test_groups_whose_timeouts_are_never_train() -> None:
    never = timedelta.max
    groups: Groups
    with running(2) as groups:
        a, b = (
            groups.replica(name, pg=ProcessGroupGloo(never), timeout=never, quorum_timeout=never, connect_timeout=never)
            for name in "ab"
        )
        groups.together(a.step, b.step)
        assert [r.manager.current_step() for r in (a, b)] == [1, 1]


def test_the_defaults_of_the_manager_and_of_the_lighthouse_command_fit_together() -> None:
    flags = {option.name: option.default for option in lighthouse.params}
    heartbeat, join = s(flags["heartbeat_timeout_ms"] / 1000), s(flags["join_timeout_ms"] / 1000)
    assert Timeouts().contradictions(heartbeat, join) == []


def test_what_is_no_timedelta_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"collective is 5: .*timedelta\(seconds=5\)"):
        Timeouts(collective=5)  # type: ignore[arg-type]


def test_the_vote_outlasts_a_collective_by_default() -> None:
    assert Timeouts(collective=s(10)).commit == s(15)
    assert Timeouts(collective=s(600), quorum=s(700)).commit == s(660)


@given(step=st.floats(0.001, 3600), size=st.integers(0, 10**13), speed=st.floats(1e6, 1e12))
def test_suggested_timeouts_never_contradict_each_other(step: float, size: int, speed: float) -> None:
    timeouts = suggest(step_seconds=step, state_bytes=size, bytes_per_second=speed)
    assert timeouts.collective.total_seconds() >= 2.9 * size / speed
    assert timeouts.collective.total_seconds() >= step
    assert str(round(timeouts.join_timeout.total_seconds() * 1000)) in timeouts.lighthouse_flags()


def test_suggest_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        suggest(step_seconds=0)


def test_how_long_a_heal_may_hold_others_up_is_the_environments_or_the_timeouts_or_the_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    minute, interval = s(60), s(0.1)

    def pause(given: Timeouts | None = None, argument: timedelta | None = None) -> timedelta | None:
        return effective(given, minute, minute, minute, interval, argument).heal_pause

    assert pause() is None
    assert pause(argument=s(3)) == s(3)
    assert pause(Timeouts(), s(3)) == s(3)
    assert pause(Timeouts(heal_pause=s(4)), s(3)) == s(4)
    monkeypatch.setenv("TORCHFT_HEAL_PAUSE_SEC", "5")
    assert pause(Timeouts(heal_pause=s(4)), s(3)) == s(5)
    monkeypatch.delenv("TORCHFT_HEAL_PAUSE_SEC")
    with pytest.raises(ValueError, match="heal_pause is 0 s"):
        pause(argument=s(0))
    with pytest.raises(TypeError, match="heal_pause is 3"):
        pause(argument=3)  # type: ignore[arg-type]


def test_a_manager_takes_them_and_says_when_its_lighthouse_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    groups: Groups
    with running(1, join_timeout_ms=30_000) as groups:
        replica = groups.replica("a", timeouts=Timeouts(collective=s(7), quorum=s(20)))
        assert (replica.manager._timeout, replica.manager._quorum_timeout) == (s(7), s(20))
        replica.step()
        assert replica.manager.current_step() == 1
        warnings: list[str] = []

        def warned() -> bool:
            warnings[:] = [r.getMessage() for r in caplog.records if "join_timeout" in r.getMessage()]
            return bool(warnings)

        wait_until(warned)
    assert len(warnings) == 1
    assert "--join_timeout_ms" in warnings[0]


def test_a_manager_refuses_timeouts_that_are_not_positive() -> None:
    groups: Groups
    with running(1) as groups, pytest.raises(ValueError, match="collective is 0 s"):
        groups.replica("a", timeout=s(0))
