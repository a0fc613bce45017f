"""Whose state would come too slowly waits, measures beside the others' steps, and tries when that is worth it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from torchft.checkpointing import CheckpointError, StepNotServed, TooSlow
from torchft.heal_pause import HealPause, Pausing
from torchft.runtime.logs import RankLogger
from torchft.runtime.loop import Timer

MB = 10**6


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.heal_pause._SOON", 0.001)
    monkeypatch.setattr("torchft.heal_pause._SELDOM", 0.001)


@contextmanager
def pause_of(measure: Callable[[], float], timeout: float = 10.0) -> Iterator[HealPause]:
    pause = HealPause(measure, timeout, RankLogger(logging.getLogger("torchft.test"), "r", 0, lambda: 7))
    try:
        yield pause
    finally:
        pause.close()
        assert pause._thread is None or not pause._thread.is_alive()


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
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 1
    assert "1.0 MB/s, so 100 MB would take 100 s, and the other groups wait 10 s" in told[0]


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


def test_who_is_refused_tries_again_at_once_and_then_waits_beside_the_others_steps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    ends: list[Callable[[], None]] = []

    def later(delay: float, end: Callable[[], None]) -> Timer:
        pauses.append(delay)
        ends.append(end)
        return Timer(delay, end)

    monkeypatch.setattr("torchft.heal_pause.call_later", later)
    monkeypatch.setattr("torchft.heal_pause._SOON", 1.0)
    monkeypatch.setattr("torchft.heal_pause._SELDOM", 3.0)
    refusal = StepNotServed("the state dict function 'x' raised")
    with pause_of(lambda: 0.0) as pause:
        assert all(0 < pause.refused(refusal) <= 0.4 for _ in range(4))
        assert not pause.waits
        for _ in range(3):
            assert pause.refused(refusal) == 0
            with pytest.raises(Pausing, match="'x' raised"):
                pause.check()
            ends.pop()()
            pause.check()
        assert pauses == [1.0, 2.0, 3.0]
        pause.over()
        assert pause.refused(refusal) > 0, "it begins anew"
    assert caplog.text.count("no group gives its state to this one") == 1
