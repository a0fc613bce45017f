"""Whose state would come too slowly waits, measures beside the others' steps, and tries when that is worth it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from torchft.checkpointing import CheckpointError, StepNotServed, TooSlow, Unauthorized
from torchft.coordination import QuorumResult
from torchft.core.assignment import Source
from torchft.heal_pause import HealPause, Pausing
from torchft.runtime.logs import RankLogger
from torchft.runtime.loop import Timer
from torchft.state import StateError

MB = 10**6


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.heal_pause._SOON", 0.001)
    monkeypatch.setattr("torchft.heal_pause._SELDOM", 0.001)


@contextmanager
def pause_of(measure: Callable[[], float], timeout: float = 10.0, **kwargs: Any) -> Iterator[HealPause]:
    log = RankLogger(logging.getLogger("torchft.test"), "r", 0, lambda: 7)
    pause = HealPause(measure, timeout, log, **{"bound": timeout, **kwargs})
    try:
        yield pause
    finally:
        pause.close()
        assert pause._thread is None or not pause._thread.is_alive()


def quorum(*, heal: bool = False, waits: bool = False, **kwargs: Any) -> QuorumResult:
    sources = [Source(0, "http://127.0.0.1:1")] if heal or waits else []
    return QuorumResult(heal=heal, recover_sources=sources, **{"max_step": 7, "max_world_size": 2, **kwargs})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def ended(pause: HealPause) -> bool:
    """Whether it has stopped waiting."""
    assert pause._thread is not None
    pause._thread.join(60)
    return not pause.waits


def test_waits_until_the_way_is_fast_enough_and_says_once_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    may_go, measured = threading.Event(), threading.Semaphore(0)

    def measure() -> float:
        measured.release()
        return 12.0 * MB if may_go.is_set() else 1.0 * MB

    with caplog.at_level("INFO"), pause_of(measure) as pause:
        pause.check()
        assert not pause.waits
        assert not pause.measured
        pause.hopeless(TooSlow("too slow", 100 * MB))
        assert pause.waits
        with pytest.raises(Pausing):
            pause.check()
        for _ in range(5):
            assert measured.acquire(timeout=60)
        assert pause.waits
        may_go.set()
        assert ended(pause)
        assert pause.measured
        pause.check()
    told = warnings(caplog)
    assert len(told) == 1
    assert "1.0 MB/s, so 100 MB would take 100 s, and the other groups wait 10 s" in told[0]


def test_a_slow_way_is_taken_when_ten_times_as_long_was_waited(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]

    def measure() -> float:
        now[0] += 1.0
        return 4.0 * MB

    with caplog.at_level("INFO"), pause_of(measure, timeout=60.0, bound=None, clock=lambda: now[0]) as pause:
        assert pause.allowance == 2.0
        pause.hopeless(TooSlow("too slow", 64 * MB))
        assert ended(pause)
        assert pause.waited == 160.0
        assert pause.allowance == 16.0
        assert pause.measured
        pause.over()
        assert pause.allowance == 16.0, "another rank of this group may have failed: it is not up to date yet"
        pause.step(quorum())
        assert (pause.waited, pause.allowance) == (0.0, 2.0)
    told = warnings(caplog)
    assert len(told) == 1
    assert "4.0 MB/s, so 64 MB would take 16 s" in told[0]
    assert "takes the state in about 159 s" in told[0]
    assert "heal_pause (TORCHFT_HEAL_PAUSE_SEC)" in told[0]
    assert "comes at 4.0 MB/s, in 16.0 s, which is fast enough after 160 s of waiting: healing" in caplog.text


def test_no_waiting_pays_for_a_way_that_must_be_a_fault_until_that_is_mended(caplog: pytest.LogCaptureFixture) -> None:
    may_go, measured, now = threading.Event(), threading.Semaphore(0), [100.0]

    def measure() -> float:
        now[0] += 1000.0
        measured.release()
        return 4.0 * MB if may_go.is_set() else 1.0 * MB

    with pause_of(measure, timeout=60.0, bound=None, clock=lambda: now[0]) as pause:
        pause.hopeless(TooSlow("too slow", 16 * MB))
        for _ in range(5):
            assert measured.acquire(timeout=60)
        assert pause.waits
        may_go.set()
        assert ended(pause)
    told = warnings(caplog)
    assert len(told) == 1
    assert (
        "1.0 MB/s, so 16 MB would take 16 s, and the other groups would stand that long, where 2 s are allowed"
        in told[0]
    )
    assert "Less than 2 MB/s is taken for a fault" in told[0]
    assert "TORCHFT_HEAL_PAUSE_SEC=20 lets this group heal all the same" in told[0]


def test_a_heal_no_longer_than_a_step_of_the_others_is_made_once_their_steps_were_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchft.heal_pause._SOON", 3600.0)
    monkeypatch.setattr("torchft.heal_pause._SELDOM", 3600.0)
    now, measured = [100.0], threading.Semaphore(0)

    def measure() -> float:
        measured.release()
        return 1.0 * MB

    with pause_of(measure, timeout=60.0, bound=None, clock=lambda: now[0]) as pause:
        pause.step(quorum(heal=True, max_step=7))
        now[0] += 500.0  # with the first try in it: no measure of a step
        pause.hopeless(TooSlow("too slow", 12 * MB))
        pause.step(quorum(waits=True, max_step=8))
        assert measured.acquire(timeout=60)
        assert pause.allowance == 2.0
        now[0] += 20.0
        pause.step(quorum(waits=True, max_step=8))  # it was tried again
        assert pause.allowance == 2.0
        now[0] += 13.0
        pause.step(quorum(waits=True, max_step=9))
        assert ended(pause), "it is measured again at once"
        assert pause.allowance == 13.0
        now[0] += 40.0
        pause.step(quorum(heal=True, max_step=12))
        assert pause.allowance == 13.0
        pause.step(quorum())
        assert pause.allowance == 2.0


def test_the_time_waited_counts_over_failed_tries_and_for_every_rank_of_the_group() -> None:
    now = [100.0]
    with (
        pause_of(lambda: 1000.0 * MB, 60.0, bound=None, clock=lambda: now[0]) as pause,
        pause_of(lambda: 0.0, 60.0, bound=None, clock=lambda: now[0]) as other,
    ):
        for wait in range(3):
            pause.hopeless(TooSlow("too slow", 100 * MB))
            now[0] += 100.0
            other.step(quorum(waits=True))
            pause._wake.set()  # the pause after a measurement that was not worth much
            assert ended(pause)
            for one in (pause, other):
                one.step(quorum(heal=True))
            other.over()  # its own part came, the other rank's did not
            assert pause.allowance == max(2.0, 10.0 * (wait + 1))
            assert other.allowance == max(2.0, 10.0 * wait)


def test_a_bound_that_is_set_is_never_passed(caplog: pytest.LogCaptureFixture) -> None:
    may_go, measured, now = threading.Event(), threading.Semaphore(0), [100.0]

    def measure() -> float:
        now[0] += 1e6
        measured.release()
        return 4.0 * MB if may_go.is_set() else 1.0 * MB

    with pause_of(measure, timeout=60.0, bound=5.0, clock=lambda: now[0]) as pause:
        pause.hopeless(TooSlow("too slow", 16 * MB))
        for _ in range(5):
            assert measured.acquire(timeout=60)
        assert pause.waits
        assert pause.allowance == 5.0
        may_go.set()
        assert ended(pause)
    assert "may hold the other groups up for 5 s (heal_pause, TORCHFT_HEAL_PAUSE_SEC)" in warnings(caplog)[0]
    assert "only a longer heal_pause lets this group heal" in warnings(caplog)[0]


@pytest.mark.parametrize("bound", [None, 0.1])
def test_who_the_others_cannot_do_without_heals_however_long_that_takes(
    bound: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SOON", "_SELDOM"):
        monkeypatch.setattr(f"torchft.heal_pause.{name}", 3600.0)
    measured = threading.Semaphore(0)

    def measure() -> float:
        measured.release()
        return 1.0 * MB

    with pause_of(measure, timeout=60.0, bound=bound, min_replica_size=2) as pause:
        pause.step(quorum(heal=True, max_step=0))
        assert pause.allowance == 60.0, "nobody has trained yet"
        pause.step(quorum(heal=True))
        assert pause.allowance == (2.0 if bound is None else bound)
        pause.hopeless(TooSlow("too slow", 16 * MB))
        assert measured.acquire(timeout=60)
        pause.step(quorum(waits=True))
        assert pause.waits, "two groups train, which is enough"
        pause.step(quorum(waits=True, max_world_size=1))
        assert ended(pause), "it does not sleep while everybody stands"
        assert pause.allowance == 60.0


def test_a_measurement_that_was_no_good_is_not_trusted_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.heal_pause._FIRST", 3600.0)
    asked: list[int] = []
    with pause_of(lambda: asked.append(1) or 1000.0 * MB) as pause:  # type: ignore[func-returns-value]
        pause.hopeless(TooSlow("too slow", 100 * MB))
        assert ended(pause)
        assert len(asked) == 1
        pause.hopeless(TooSlow("too slow all the same", 100 * MB))
        pause.stop()
        assert ended(pause)
        assert len(asked) == 1


def test_where_nothing_can_be_measured_it_tries_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.heal_pause._FIRST", 0.5)

    def refuse() -> float:
        raise CheckpointError("this transport does not measure")

    for nbytes in (0, 100 * MB):
        with pause_of(refuse) as pause:
            pause.hopeless(TooSlow("too slow", nbytes))
            assert pause.waits
            assert ended(pause)
            assert not pause.measured


def test_a_heal_that_went_well_is_a_measurement() -> None:
    with pause_of(lambda: 0.0) as pause:
        pause.over()
        assert pause.measured


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Callable[[], None]]]:
    """Seconds and call of each timer that is set. None of them ends by itself."""
    timers: list[tuple[float, Callable[[], None]]] = []

    def later(delay: float, end: Callable[[], None]) -> Timer:
        timers.append((delay, end))
        return Timer(delay, end)

    monkeypatch.setattr("torchft.heal_pause.call_later", later)
    return timers


def test_who_is_refused_tries_again_at_once_and_then_waits_beside_the_others_steps(
    timers: list[tuple[float, Callable[[], None]]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchft.heal_pause._SOON", 1.0)
    monkeypatch.setattr("torchft.heal_pause._ASKED_AGAIN", 3.0)
    refusal = StepNotServed("the state dict function 'x' raised")
    with pause_of(lambda: 0.0) as pause:
        assert all(0 < pause.refused(refusal, 0.01) <= 0.4 for _ in range(4))
        assert not pause.waits
        for _ in range(3):
            assert pause.refused(refusal, 0.01) == 0
            with pytest.raises(Pausing, match="'x' raised"):
                pause.check()
            timers[-1][1]()
            pause.check()
        assert [seconds for seconds, _ in timers] == [1.0, 2.0, 3.0]
        for _ in range(2000):  # hours
            pause.refused(refusal, 0.01)
        assert timers[-1][0] == 3.0
        pause.refused(refusal, 4.0)
        assert timers[-1][0] == 40.0, "the try held the others up for 4 s"
        pause.over()
        assert 0 < pause.refused(refusal, 0.01) <= 0.05, "it begins anew"
    assert caplog.text.count("no group gives its state to this one") == 1


def test_who_cannot_take_the_state_does_not_fetch_it_in_each_step(
    timers: list[tuple[float, Callable[[], None]]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchft.heal_pause._SOON", 1.0)
    misfit = StateError("the source's state has other keys")
    with pause_of(lambda: 0.0) as pause:
        pause.misfits(misfit, 0.5)
        assert not pause.waits, "what a function raised may be over"
        for _ in range(3):
            pause.over()  # it came well
            pause.misfits(misfit, 0.5)
            with pytest.raises(Pausing, match="other keys"):
                pause.check()
            timers[-1][1]()
        assert [seconds for seconds, _ in timers] == [5.0, 5.0, 5.0], "ten times what it cost"
        pause.fits()
        pause.misfits(misfit, 0.5)
        assert not pause.waits
    assert caplog.text.count("this group cannot take the others' state") == 1


def test_without_whom_nobody_goes_on_does_not_wait(timers: list[tuple[float, Callable[[], None]]]) -> None:
    with pause_of(lambda: 0.0) as pause:
        pause.step(quorum(heal=True, max_step=0))
        for _ in range(20):
            assert pause.refused(StepNotServed("the state dict function 'x' raised"), 0.01) > 0
            pause.misfits(StateError("other keys"), 0.01)
        assert not pause.waits
        assert not timers


def test_another_token_is_an_error_that_is_said_once_and_tried_seldom(
    timers: list[tuple[float, Callable[[], None]]], caplog: pytest.LogCaptureFixture
) -> None:
    refusal = Unauthorized("replica rank 0 asks for a token, and another one was given")
    with pause_of(lambda: 0.0) as pause:
        for _ in range(5):
            assert pause.refused(refusal, 0.01) == 0
            with pytest.raises(Pausing, match="another one was given"):
                pause.check()
            timers[-1][1]()
            pause.check()
        assert [seconds for seconds, _ in timers] == [10.0, 20.0, 40.0, 60.0, 60.0]
        (error,) = [r for r in caplog.records if r.levelname in ("ERROR", "WARNING")]
        assert error.levelname == "ERROR"
        assert "set TORCHFT_TOKEN to the same text in all groups" in error.getMessage()
        pause.over()
        pause.refused(refusal, 0.01)
    assert caplog.text.count("the token of this group is not that of the groups that have the state") == 2
