"""Who is alive, who waits, and how many of them are what: the bookkeeping under :mod:`torchft.core.membership`.

The idea
    With thousands of replicas nothing may be counted anew at each event. So every set and number that a decision looks
    at is kept up to date by the few methods that change what it depends on.

Invariants
    - A *ready* replica waits and is healthy; an *absent* one is healthy and does not wait.
    - ``watched`` are the healthy without a session: only their silence can be a death.
"""

from __future__ import annotations

from itertools import islice

from torchft.core.members import Member, Quorum

__all__ = ["Roster"]

_NAMED = 5


class Roster:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.last_sign: dict[str, float] = {}
        """Of the healthy."""
        self.sessions: set[str] = set()
        self.waiters: dict[str, tuple[Member, float]] = {}
        """And since when they wait."""
        self.members: dict[str, Member] = {}
        """Of the previous quorum, as they were taken into it."""
        self.watched: set[str] = set()
        self.ready_members = 0
        """Ready replicas that are in the previous quorum."""
        self.shrinking: set[str] = set()
        """Waiters that ask to take nobody new in."""
        self.holding: set[str] = set()
        """Waiters that hold a state: they are beyond step 0."""
        self.complaints: dict[str, float] = {}
        """Waiters that waited for others in vain, and since when they ask."""
        self._absent: dict[str, None] = {}
        self._stale: set[str] = set()  # waiters that are not healthy

    @property
    def healthy(self) -> int:
        return len(self.last_sign)

    @property
    def ready(self) -> int:
        return len(self.waiters) - len(self._stale)

    def absent(self) -> tuple[list[str], int]:
        """Names of some that are absent, and how many there are."""
        few = list(islice(self._absent, _NAMED)) if len(self._absent) > _NAMED else sorted(self._absent)
        return few, len(self._absent)

    def ready_ones(self) -> dict[str, Member]:
        """Sorted by replica id."""
        return {rid: self.waiters[rid][0] for rid in sorted(self.waiters) if rid in self.last_sign}

    def waits(self, replica_id: str) -> bool:
        return replica_id in self.waiters

    # ------------------------------------------------------------- changes

    def sign(self, replica_id: str, now: float) -> None:
        """It is healthy."""
        if replica_id not in self.last_sign:
            if replica_id not in self.sessions:
                self.watched.add(replica_id)
            if replica_id in self.waiters:
                self._stale.discard(replica_id)
                self.ready_members += replica_id in self.members
            else:
                self._absent[replica_id] = None
        self.last_sign[replica_id] = now

    def drop(self, replica_id: str) -> float:
        """It is healthy no more. Returns its last sign."""
        self.watched.discard(replica_id)
        if replica_id in self.waiters:
            self._stale.add(replica_id)
            self.ready_members -= replica_id in self.members
        else:
            del self._absent[replica_id]
        return self.last_sign.pop(replica_id)

    def open(self, replica_id: str) -> None:
        """It has a session."""
        self.sessions.add(replica_id)
        self.watched.discard(replica_id)

    def close(self, replica_id: str) -> None:
        """It has none any more."""
        self.sessions.discard(replica_id)
        if replica_id in self.last_sign:
            self.watched.add(replica_id)

    def wait(self, member: Member, now: float) -> None:
        """It waits, and is healthy."""
        rid = member.replica_id
        self.unwait(rid)
        self.sign(rid, now)
        self.waiters[rid] = member, now
        del self._absent[rid]
        self.ready_members += rid in self.members
        if member.shrink_only:
            self.shrinking.add(rid)
        if member.step > 0:
            self.holding.add(rid)
        if member.timed_out:
            self.complaints[rid] = now

    def unwait(self, replica_id: str) -> None:
        """It waits no more."""
        if self.waiters.pop(replica_id, None) is None:
            return
        self.shrinking.discard(replica_id)
        self.holding.discard(replica_id)
        self.complaints.pop(replica_id, None)
        if replica_id in self.last_sign:
            self._absent[replica_id] = None
            self.ready_members -= replica_id in self.members
        else:
            self._stale.discard(replica_id)

    def take(self, quorum: Quorum) -> None:
        """That is the previous quorum from now on."""
        self.members = {m.replica_id: m for m in quorum.participants}
        self.ready_members = sum(rid in self.members and rid in self.last_sign for rid in self.waiters)

    def admit(self, member: Member) -> None:
        """That one is in the previous quorum as well."""
        rid = member.replica_id
        if rid not in self.members:
            self.ready_members += rid in self.waiters and rid in self.last_sign
        self.members[rid] = member
