"""How a group goes on purpose: at once, or drained, at a step where that costs the others nothing.

Rules
    - A group that was asked to drain (SIGTERM, :mod:`torchft.departure`) trains on until the others have agreed on the
      step from which on it is not there, for ten seconds at the most.
    - A group leaves once. There is no step after it.
"""

from __future__ import annotations

from datetime import timedelta

from torchft.departure import drain_requested
from torchft.group import Group
from torchft.progress import Progress
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import RankLogger

__all__ = ["Leaving"]

_DRAIN_TIMEOUT = timedelta(seconds=10)
_LEAVE_TIMEOUT = timedelta(seconds=1)


class Leaving:
    """One group's, seen by one of its ranks.

    Args:
        group: that goes.
        progress: of this replica.
        drain: SIGTERM, which is listened to, asks for it.
        log: of the manager.
    """

    def __init__(self, group: Group, progress: Progress, drain: bool, log: RankLogger) -> None:
        self._group = group
        self._progress = progress
        self._drain = drain
        self._log = log
        self._until: Deadline | None = None
        self.left: str | None = None
        """Why it has left; None: it has not."""

    @property
    def asked(self) -> bool:
        """It is to drain."""
        return self._drain and drain_requested()

    def waits(self) -> bool:
        """Whether the others are being asked to let this group go between two steps."""
        if self._until is None and self._group.drain():
            self._until = Deadline(_DRAIN_TIMEOUT)
        return self._until is not None and not self._until.expired

    def leave(self, reason: str) -> bool:
        """Tells everybody, the first time. Returns whether they were told."""
        if self.left is not None:
            return False
        self.left = reason
        self._log.info("leaving: %s", reason)
        return self._group.leave(reason, self._progress.step, _LEAVE_TIMEOUT)
