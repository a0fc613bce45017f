from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.futures import Future

from torchft.futures import context_timeout, future_timeout, future_wait, outcome
from torchft.runtime.loop import Timer, call_later

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=30)


def test_a_value_and_an_error_pass_through() -> None:
    good: Future[int] = Future()
    bounded = future_timeout(good, LONG)
    good.set_result(3)
    assert bounded.wait() == 3
    assert future_wait(good, LONG) == 3

    bad: Future[int] = Future()
    bounded = future_timeout(bad, LONG)
    bad.set_exception(ValueError("no"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no"):
        bounded.wait()
    with pytest.raises(ValueError, match="no"):
        future_wait(bad, LONG)


def test_a_future_that_never_completes_fails_with_a_timeout_error() -> None:
    never: Future[int] = Future()
    with pytest.raises(TimeoutError, match=r"0\.03 s"):
        future_timeout(never, SHORT).wait()
    with pytest.raises(TimeoutError, match=r"0\.03 s"):
        future_wait(never, SHORT)


def test_a_value_that_comes_after_the_timeout_is_dropped() -> None:
    late: Future[int] = Future()
    bounded = future_timeout(late, SHORT)
    with pytest.raises(TimeoutError):
        bounded.wait()
    late.set_result(1)
    with pytest.raises(TimeoutError):
        bounded.value()


def test_a_block_that_takes_too_long_is_told_and_one_that_does_not_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = threading.Event()
    with context_timeout(told.set, SHORT):
        assert told.wait(30)
    timers: list[Timer] = []

    def noted(delay: float, callback: Callable[[], None]) -> Timer:
        timers.append(call_later(delay, callback))
        return timers[-1]

    monkeypatch.setattr("torchft.futures.call_later", noted)
    with context_timeout(told.clear, LONG):
        assert timers[0].callback is not None
    assert timers[0].callback is None, "it is called off"


class _Failure(RuntimeError):
    """One that can be watched."""


def test_a_future_that_failed_keeps_nothing_for_ever() -> None:
    def make() -> weakref.ref[_Failure]:
        error = _Failure("injected")
        bad: Future[int] = Future()
        bad.set_exception(error)  # type: ignore[arg-type]
        assert outcome(future_timeout(bad, LONG))[1] is error
        return weakref.ref(error)

    kept = make()
    gc.collect()
    assert kept() is None
