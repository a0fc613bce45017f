"""The one deadline type.

A caller says *how long* (a ``timedelta`` or seconds); what travels inside is *until when*, on the monotonic
clock, so that a wait split into several waits never adds up to more than was asked for.
"""

from __future__ import annotations

import time
from datetime import timedelta

__all__ = ["LONGEST", "Deadline", "seconds"]

LONGEST = timedelta(days=3653)
"""Ten years. What the system waits by, and adds up, overflows at a few hundred."""
_TO_HEAR = 1.0
"""Seconds within which an answer has come that was sent: two processes get to run for it, on machines that are busy."""


def seconds(timeout: timedelta | float) -> float:
    """A timeout in seconds, whichever way the caller wrote it; what is longer than ten years is cut to them."""
    asked = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    return min(asked, LONGEST.total_seconds())


class Deadline:
    """A point on the monotonic clock until which something may take."""

    __slots__ = ("_timeout", "at")

    def __init__(self, timeout: timedelta | float) -> None:
        self._timeout = seconds(timeout)
        self.at = time.monotonic() + self._timeout

    @property
    def timeout(self) -> float:
        """What was asked for, seconds: for error messages."""
        return self._timeout

    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    def remaining_to_answer(self) -> float:
        """Seconds that another process may take to answer, so that its reason for a refusal comes before this is over
        and not just the timeout: a second less than what remains, or half of the timeout where that is shorter.
        """
        return max(0.0, self.remaining() - min(_TO_HEAR, max(0.0, self._timeout) / 2))

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def __repr__(self) -> str:
        return f"Deadline({self._timeout:g}s, {self.remaining():.3f}s left)"
