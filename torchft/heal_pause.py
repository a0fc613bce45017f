"""A replica that cannot get its state in time does not try in each step: a try may hold the others up for a moment."""

from __future__ import annotations

import time

__all__ = ["HealPause", "Pausing"]

_FIRST = 10.0
_LONGEST = 300.0


class Pausing(RuntimeError):
    """No heal is tried yet, after one that was hopeless."""


class HealPause:
    """Between a hopeless heal and the next try: ``_FIRST`` seconds, twice as long each time."""

    def __init__(self) -> None:
        self._length = 0.0
        self._until = 0.0

    def check(self) -> None:
        """
        Raises:
            Pausing: it is too early.
        """
        left = self._until - time.monotonic()
        if left > 0:
            raise Pausing(f"the sources are too slow for this state; the next try is in {left:.0f} s")

    def begin(self) -> None:
        """A heal was hopeless."""
        self._length = min(_LONGEST, max(_FIRST, 2 * self._length))
        self._until = time.monotonic() + self._length

    def over(self) -> None:
        """A heal went well."""
        self._length = self._until = 0.0
