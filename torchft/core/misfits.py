"""Groups that cannot take part: they have another number of ranks than those that are there.

The idea
    Rank r of a group meets the others' ranks r. Where one group has more ranks than another, its last ones would wait
    for nobody until their timeouts, step after step, and keep the others from every commit. So the lighthouse lets only
    one number in: that of the groups that live already, or of the one that asked first.

Invariants
    - Who is refused is not waited for, however much it shows that it lives.
    - A group whose number is not known (0: an adopted quorum's) is never refused, and nobody because of it. Neither is
      who asks without a session: of those nobody knows whether they train together.
"""

from __future__ import annotations

from itertools import chain, islice

from torchft.core.members import Member
from torchft.core.roster import Roster

__all__ = ["Misfits"]

_REMEMBERED = 4096
_LOOKED_AT = 16
"""Of those that live. All that were let in have the same number, so the first that tells it is enough."""


class Misfits:
    """Who was refused, and who is to be.

    Args:
        roster: who is there.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._refused: dict[str, None] = {}

    def __contains__(self, replica_id: object) -> bool:
        return replica_id in self._refused

    def refuse(self, member: Member) -> Member | None:
        """Because of which living member of the previous quorum, or which that waits, one that asks is refused.

        None: it is not.
        """
        roster, me = self._roster, member.replica_id
        there = chain(roster.members.values(), (m for m, _ in roster.waiters.values()))
        living = (m for m in there if m.replica_id in roster.last_sign and m.replica_id != me)
        other = next((m for m in islice(living, _LOOKED_AT) if m.standing and m.world_size), None)
        if other is None or not member.standing or member.world_size in (0, other.world_size):
            self._refused.pop(me, None)
            return None
        self._refused[me] = None
        if len(self._refused) > _REMEMBERED:
            del self._refused[next(iter(self._refused))]
        return other
