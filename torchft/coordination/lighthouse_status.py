"""What a lighthouse says of its quorums: each new one, and why there is none yet.

Rules
    - A new quorum is a line at INFO; one that stands is asked for at each step, and only a line at DEBUG.
    - Why there is none yet is worth a line when it has stood for a second, and again each minute. Those who wait are
      told the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from torchft.core.membership import Membership, Outcome, Quorum

__all__ = ["StatusLog", "status_of"]

logger = logging.getLogger("torchft.coordination.lighthouse_service")

_STILL_WAITING = 1.0
"""Seconds after which a reason for "not yet" is worth a line at INFO."""
_REMINDED = 60.0
"""Seconds until it is said again, while it stands."""


class StatusLog:
    """Of one lighthouse."""

    def __init__(self) -> None:
        self._tell_at: float | None = None
        self._announced_id = 0
        self.told = False
        """Whether those who wait have been told why, since that changed last."""

    def formed(self, quorum: Quorum, why: str) -> None:
        """A quorum was formed, or asked for again."""
        new = quorum.quorum_id != self._announced_id
        self._announced_id = quorum.quorum_id
        logger.log(
            logging.INFO if new else logging.DEBUG,
            "quorum %d of %d replicas at step %d: %s (%s)",
            quorum.quorum_id,
            len(quorum.participants),
            max(m.step for m in quorum.participants),
            ", ".join(quorum.replica_ids[:16]) + (" …" if len(quorum.replica_ids) > 16 else ""),
            why,
        )

    def due(self, outcome: Outcome, somebody_waits: Callable[[], bool]) -> bool:
        """Something happened, if only that time has passed: whether those who wait are to be told why, now.

        Args:
            outcome: what the core says of it.
            somebody_waits: for a quorum.
        """
        now = time.monotonic()
        if outcome.status is not None:
            logger.debug("%s", outcome.status)
            waits = outcome.quorum is None and somebody_waits()
            self._tell_at = now + _STILL_WAITING if waits else None
            self.told = False
        elif self._tell_at is not None and now >= self._tell_at:
            self._tell_at = now + _REMINDED
            self.told = True
            return True
        return False


def status_of(membership: Membership, durable: bool) -> str:
    """Why there is, or is not yet, a quorum; for how long, and what to do, where that is known.

    Args:
        membership: of the lighthouse.
        durable: whether its last quorum is written down, so that it can be told to forget it.
    """
    until, last = membership.takeover_at, membership.previous
    if until is None or last is None:
        return membership.status
    left = max(0.0, until - time.monotonic())
    hint = ""
    if durable:
        hint = f". If you know that they are gone, start this lighthouse again with --forget {last.quorum_id}"
    return f"{membership.status}. That is in {left:.0f} s{hint}"
