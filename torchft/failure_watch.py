"""Whether a death concerns the step under way.

The idea
    Notices and quorums come on different connections, in any order. So the watch keeps the notices it was given
    and knows the quorum in use; whichever comes second meets the first. A notice says up to which quorum id the
    dead replica's quorums are broken, so one that came back under the same name is not taken for dead again.

Rules
    - A notice about a replica that is not in the quorum in use concerns nobody now.
    - A replica that left in good order after a step does not break that step for who is still in it.
    - Each entered quorum is told at most one notice: it is broken then.
    - A notice about a rank of this group knows no quorum id. It holds until that rank is seen to be back, or until a
      vote in which all ranks took part; not every lighthouse says a word that would replace it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

from torchft.coordination.types import ANY_QUORUM, Notice

__all__ = ["FailureWatch", "ReplicaLost"]

_REMEMBERED = 1024


class ReplicaLost(RuntimeError):
    """A member of this step's quorum is no longer there, or gave the step up. The message says why."""


class FailureWatch:
    """From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notices: dict[str, Notice] = {}
        self._heard: dict[str, float] = {}  # of those that know no quorum id
        self._quorum: tuple[Collection[str], int, int] | None = None
        self._act: Callable[[Notice], None] = _ignore

    def enter(self, members: Collection[str], quorum_id: int, step: int, act: Callable[[Notice], None]) -> None:
        """From now on a quorum is in use.

        Args:
            members: its replica ids; in a large quorum this group's alone: notices tell then who was in it.
            quorum_id: its id.
            step: the step that its members work on.
            act: called once if one of them dies; at once if that is known already.
        """
        with self._lock:
            self._quorum, self._act = (members, quorum_id, step), act
            for replica_id in [r for r, n in self._notices.items() if n.quorum_id < quorum_id]:
                self._forget(replica_id)  # ids go up: it concerns nobody any more
            hit = next(filter(self._breaks, self._notices.values()), None)
            if hit is not None:
                self._quorum = None
        if hit is not None:
            act(hit)

    def exit(self) -> None:
        """The step is over: deaths concern the next quorum."""
        with self._lock:
            self._quorum, self._act = None, _ignore

    def cause(self, replica_id: str) -> str | None:
        """Why a replica is no longer there, as far as that is known."""
        with self._lock:
            notice = self._notices.get(replica_id)
        return None if notice is None or notice.lives else notice.cause

    def last(self, replica_id: str) -> Notice | None:
        """What was heard of a replica and holds, as far as is known."""
        with self._lock:
            return self._notices.get(replica_id)

    def hear(self, notice: Notice) -> None:
        """A replica is no longer there."""
        with self._lock:
            self._notices.pop(notice.replica_id, None)
            self._notices[notice.replica_id] = notice
            self._heard.pop(notice.replica_id, None)
            if notice.quorum_id >= ANY_QUORUM:
                self._heard[notice.replica_id] = time.monotonic()
            if len(self._notices) > _REMEMBERED:
                self._forget(next(iter(self._notices)))
            hit, act = self._breaks(notice), self._act
            if hit:
                self._quorum = None
        if hit:
            act(notice)

    def back(self, notice: Notice) -> None:
        """What this notice said does not hold any more: it breaks no further quorum."""
        with self._lock:
            if self._notices.get(notice.replica_id) is notice:
                self._forget(notice.replica_id)

    def whole(self, since: float) -> None:
        """All ranks of this group were there at ``since`` (:func:`time.monotonic`) or later."""
        with self._lock:
            for replica_id in [r for r, heard in self._heard.items() if heard <= since]:
                self._forget(replica_id)

    def _forget(self, replica_id: str) -> None:
        del self._notices[replica_id]
        self._heard.pop(replica_id, None)

    def _breaks(self, notice: Notice) -> bool:
        if self._quorum is None:
            return False
        members, quorum_id, step = self._quorum
        if not notice.since <= quorum_id <= notice.quorum_id or step < notice.step:
            return False
        return notice.since > 0 or notice.replica_id in members


def _ignore(notice: Notice) -> None:
    """No quorum is in use."""
