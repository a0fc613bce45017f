"""The one retry helper: exponential backoff with full jitter, bounded by a deadline."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from torchft.runtime.deadline import Deadline

__all__ = ["Backoff", "doubled", "retry"]

T = TypeVar("T")


class Backoff:
    """Delays that double from ``first`` to ``last`` seconds, each drawn from the upper half of its range.

    The jitter keeps a thousand groups that lost the same server from coming back in the same millisecond.
    """

    def __init__(self, first: float = 0.05, last: float = 2.0) -> None:
        self._next = first
        self._last = last

    def delay(self) -> float:
        span = self._next
        self._next = min(self._last, span * 2)
        return span * random.uniform(0.5, 1.0)


def doubled(first: float, times: int, last: float) -> float:
    """``first`` seconds doubled so many times, at most ``last``. However often: a float has an end."""
    return min(last, first * 2.0 ** min(times, 64))


def retry(
    attempt: Callable[[], T],
    *,
    deadline: Deadline,
    retryable: Callable[[Exception], bool],
    attempts: int | None = None,
    on_retry: Callable[[Exception, float], None] | None = None,
    backoff: Backoff | None = None,
    stop: threading.Event | None = None,
) -> T:
    """Calls ``attempt`` until it returns, and returns what it returned.

    Args:
        attempt: called with nothing; it bounds its own waiting by the same deadline.
        deadline: after it no further attempt is made.
        retryable: whether this exception is worth another attempt.
        attempts: at most so many calls; None: as many as the deadline allows.
        on_retry: told the exception and the coming delay in seconds.
        backoff: the delays; a fresh :class:`Backoff` by default.
        stop: ends the waiting early when set.

    Raises:
        Exception: what the last attempt raised.
    """
    backoff = backoff or Backoff()
    stop = stop or threading.Event()
    made = 0
    while True:
        made += 1
        try:
            return attempt()
        except Exception as e:
            delay = min(backoff.delay(), deadline.remaining())
            if not retryable(e) or deadline.expired or (attempts is not None and made >= attempts):
                raise
            if on_retry is not None:
                on_retry(e, delay)
            if stop.wait(delay) or deadline.expired:
                raise
