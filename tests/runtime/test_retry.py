"""Retries end with a result, with the last error, or with the deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from torchft.runtime.deadline import Deadline
from torchft.runtime.retry import Backoff, retry


class Flaky:
    """Fails so many times, then returns its number of calls."""

    def __init__(self, failures: int, error: Callable[[int], Exception] = lambda n: OSError(f"attempt {n}")) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error(self.calls)
        return self.calls


def quick() -> Backoff:
    return Backoff(first=0.0001, last=0.0002)


def always(error: Exception) -> bool:
    return True


def test_returns_what_the_first_success_returns() -> None:
    told: list[tuple[str, float]] = []
    attempt = Flaky(3)
    got = retry(
        attempt,
        deadline=Deadline(30),
        retryable=always,
        backoff=quick(),
        on_retry=lambda e, delay: told.append((str(e), delay)),
    )
    assert got == 4
    assert [text for text, _ in told] == ["attempt 1", "attempt 2", "attempt 3"]
    assert all(0 <= delay <= 0.0002 for _, delay in told)


def test_error_that_is_not_retryable_is_raised_at_once() -> None:
    attempt = Flaky(9, lambda n: ValueError(f"attempt {n}"))
    with pytest.raises(ValueError, match="attempt 1"):
        retry(attempt, deadline=Deadline(30), retryable=lambda e: isinstance(e, OSError))
    assert attempt.calls == 1


def test_attempts_are_counted_and_the_last_error_is_raised() -> None:
    attempt = Flaky(9)
    told: list[Exception] = []
    with pytest.raises(OSError, match="attempt 3"):
        retry(
            attempt,
            deadline=Deadline(30),
            retryable=always,
            attempts=3,
            backoff=quick(),
            on_retry=lambda e, _: told.append(e),
        )
    assert attempt.calls == 3
    assert len(told) == 2, "nobody is told of a retry that is not made"


def test_deadline_that_has_passed_allows_one_attempt() -> None:
    attempt = Flaky(9)
    with pytest.raises(OSError, match="attempt 1"):
        retry(attempt, deadline=Deadline(0), retryable=always)
    assert attempt.calls == 1


def test_no_attempt_is_made_after_the_deadline() -> None:
    deadline = Deadline(0.5)
    late: list[int] = []

    def attempt() -> None:
        if deadline.expired:
            late.append(1)
        raise OSError("the real cause")

    with pytest.raises(OSError, match="the real cause"):
        retry(attempt, deadline=deadline, retryable=always, backoff=Backoff(first=10, last=10))
    assert deadline.expired
    assert not late


def test_stop_ends_the_waiting_between_attempts() -> None:
    stop = threading.Event()
    attempt = Flaky(9)
    with pytest.raises(OSError, match="attempt 1"):
        retry(
            attempt,
            deadline=Deadline(3600),
            retryable=always,
            backoff=Backoff(first=3600, last=3600),
            on_retry=lambda e, delay: stop.set(),
            stop=stop,
        )
    assert attempt.calls == 1


def test_interrupt_is_never_retried() -> None:
    calls = 0

    def attempt() -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(attempt, deadline=Deadline(30), retryable=always)
    assert calls == 1


def test_backoff_doubles_up_to_its_limit_with_jitter() -> None:
    for _ in range(20):
        backoff = Backoff(first=1, last=4)
        for span in (1, 2, 4, 4, 4):
            assert span / 2 <= backoff.delay() <= span
    assert len({Backoff().delay() for _ in range(20)}) > 1, "a thousand groups do not come back in one millisecond"
