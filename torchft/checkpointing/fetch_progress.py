"""How far a fetch is: for the log, for the metrics, and to judge how long the rest will take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from torchft.checkpointing.transport import TooSlow
from torchft.core.heal_allowance import hopeless
from torchft.runtime.logs import SpeakerLogger

__all__ = ["FetchProgress"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

_QUIET = 2.0
_EVERY = 1.0
_FIRST = 0.05
_SPAN = 0.5
_GLANCES = ((0.25, 1.0), (0.05, 4.0))
"""Seconds since the first bytes came, and how many times too slow is far too slow by then."""
_GLANCED = 2 * _SPAN
"""Seconds after which there is more to judge by than a glance."""


class FetchProgress:
    """Of one fetch. Its owner's lock guards it.

    Args:
        step: of the state.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._began = self._counted = time.monotonic()
        self._told = self._began + _QUIET - _EVERY
        self._told_bytes = 0
        self._judged = self._began
        self._judged_bytes = self._slow_spans = 0
        self._first: tuple[float, int] | None = None
        self._offered = False
        self._heard = self._began, 0
        self.total = 0
        """Bytes of the state."""
        self.done = 0
        """Bytes that are there and verified."""
        self.borrowed = 0
        """Bytes that were copied out of a source's memory, on this machine."""
        self.kept = 0
        """Bytes that were kept from an earlier attempt."""
        self.received = 0
        """Bytes of data that came, those included that were not right or came twice."""
        self.retries = 0
        """Connections that were lost and made anew."""
        self.bad = 0
        """Chunks that did not have their hash."""
        self.bad_sources: list[str] = []
        """Sources that are not believed."""
        self.sources = 0
        """That gave chunks."""
        self.compared = 0
        """Sources that told hashes of their own, to be compared."""
        self.taken_over: set[int] = set()
        """Workers that were ended because others are faster."""

    @property
    def elapsed(self) -> float:
        """Seconds since the data was asked for."""
        return time.monotonic() - self._began

    def begin(self, total: int, kept: int) -> None:
        """The data is asked for."""
        self._offered = True
        self.total, self.done, self.kept = total, kept, kept
        self._began = self._counted = time.monotonic()
        self._told = self._began + _QUIET - _EVERY
        self._judged = self._began
        self._first = None

    def landed(self, nbytes: int) -> None:
        self.done += nbytes

    def lost(self, nbytes: int) -> None:
        """What was there is not believed."""
        self.done -= nbytes

    def seconds_left(self, received: int) -> float:
        """At the pace so far; 0 while it is too early to say."""
        elapsed = self.elapsed
        if elapsed < _FIRST:
            return 0.0
        return self._missing(received) * elapsed / max(1, received)

    def silent_for(self, received: int) -> float:
        """Seconds in which nothing came."""
        now = time.monotonic()
        if received != self._heard[1]:
            self._heard = now, received
        return now - max(self._heard[0], self._began)

    def hopeless(self, received: int, time_left: float, allowance: float = math.inf) -> bool:
        """Whether it comes, but so slowly that it is better given up, over two spans of time and on average.

        What does not come at all is not judged: a source may pause, and go on as fast as ever. And one that has given
        much before may stumble.

        Args:
            received: bytes of data that came.
            time_left, allowance: seconds until it is given up in any case, and that all of it may take
                (:func:`torchft.core.heal_allowance.hopeless`).
        """
        now = time.monotonic()
        span, came = now - self._judged, received - self._judged_bytes
        if span < _SPAN or came <= 0:
            return False
        seconds_a_byte = min(span / came, self.elapsed / received)
        slow = hopeless(self.elapsed, self._missing(received) * seconds_a_byte, time_left, allowance)
        self._judged, self._judged_bytes = now, received
        self._slow_spans = self._slow_spans + 1 if slow else 0
        return self._slow_spans >= 2

    def far_too_slow(self, received: int, allowance: float) -> bool:
        """Whether the rest would take longer than ``allowance``, at the pace since the first bytes came: a glance,
        which may err.

        It costs those who wait a quarter of a second at most, where :meth:`hopeless` takes its time to be sure.
        """
        now = time.monotonic()
        if received <= 0:
            return False
        if self._first is None:
            self._first = now, received
            return False
        span, came = now - self._first[0], received - self._first[1]
        if came <= 0 or span > _GLANCED:
            return False  # it may pause
        needed = self._missing(received) * span / came
        return any(span >= after and needed > times * allowance for after, times in _GLANCES)

    def _missing(self, received: int) -> int:
        return self.total - self.kept - received

    def check_pace(
        self, received: int, time_left: float, allowance: float, unmeasured: bool, sources: Sequence[object]
    ) -> None:
        """Gives up what comes too slowly.

        Args:
            received: bytes so far.
            time_left, allowance: as of :meth:`hopeless`.
            unmeasured: a glance is enough: nothing is known about the way to the sources, and others wait.
            sources: it comes from.

        Raises:
            TooSlow: it would not be there in time.
        """
        glance = unmeasured and self.far_too_slow(received, min(time_left, allowance))
        if self.hopeless(received, time_left, allowance) or glance:
            limit = f"{time_left:.0f}s are left for the rest. A longer timeout lets the other groups wait longer for it"
            if allowance < math.inf:
                limit = f"it may hold the other groups up for {allowance:.1f}s"
            raise TooSlow(
                f"step {self._step} comes too slowly from source {', '.join(map(str, sources))}: {received / 1e6:.1f} "
                f"of {self.total / 1e6:.0f} MB came in {self.elapsed:.2f}s, and {limit}",
                self.total,
            )

    def tell(self, received: int, sources: int) -> None:
        """A line each second, for a fetch that takes longer than two."""
        now = time.monotonic()
        if now - self._told < _EVERY:
            return
        rate = (received - self._told_bytes) / (now - self._counted)
        self._told = self._counted = now
        self._told_bytes = received
        logger.info("receiving step %d: %s, %.2f GB/s from %d sources", self._step, str(self), rate / 1e9, sources)

    def __str__(self) -> str:
        if not self._offered:
            return "no source has offered it"
        share = 100 * self.done / self.total if self.total else 100.0
        return (
            f"{self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB ({share:.0f} %), "
            f"{self.retries + len(self.taken_over)} retries, {self.bad} bad chunks"
        )
