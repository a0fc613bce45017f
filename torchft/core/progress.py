"""How far the job is, as far as the lighthouse has heard: so that nobody begins again at step 0 without knowing it.

The idea
    A state lives in the replicas that hold it and dies with the last of them. Who is left then has its first weights,
    or half a state, and would happily train from step 0. So the lighthouse remembers which step each living replica
    is at, and who was there when the job was further.

Rules
    - A replica has *seen* a step when it asked while another one that lived was at it, or says so itself. It is a
      survivor of that step: where nobody holds a state any more, it knows that one is lost.
    - Who asks for the first time when nobody of the former job lives has seen nothing: to it the job begins anew.
      It is told how far the former one was, unless that ended in good order.
    - While members hold nothing (step 0, or below: no usable state) and a living replica is further, there is no
      quorum without that one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchft.core.members import Member

__all__ = ["JobProgress"]


@dataclass(slots=True)
class _Known:
    step: int
    seen: int


class JobProgress:
    """From the requests and deaths that a :class:`torchft.core.membership.Membership` hears of."""

    def __init__(self) -> None:
        self._living: dict[str, _Known] = {}
        self._top: int | None = 0  # of the living; None: to be looked for
        self._furthest = 0

    @property
    def began(self) -> bool:
        """Whether anybody was ever beyond step 0."""
        return self._furthest > 0

    def asks(self, member: Member) -> Member:
        """A replica asks for a quorum. Returns it with what it has seen."""
        known = self._living.setdefault(member.replica_id, _Known(member.step, member.seen_step))
        if known.step == self._top and member.step < known.step:
            self._top = None
        known.step = member.step
        self._furthest = max(self._furthest, member.step)
        if self._top is None:
            self._top = max(k.step for k in self._living.values())
        self._top = max(self._top, member.step)
        known.seen = max(known.seen, member.seen_step, self._top)
        return replace(member, seen_step=known.seen)

    def reached(self, replica_id: str, step: int) -> None:
        """A living replica is at this step, without having asked."""
        known = self._living.get(replica_id)
        if known is not None:
            known.step = max(known.step, step)
            self._top = None if self._top is None else max(self._top, step)
            self._furthest = max(self._furthest, step)

    def ended(self, replica_id: str, in_order: bool) -> None:
        """A replica is no longer there.

        Args:
            in_order: it left with what it did committed. When it was the last one, the job is over.
        """
        known = self._living.pop(replica_id, None)
        if known is not None and known.step == self._top:
            self._top = None
        if in_order and not self._living:
            self._furthest = 0

    def missed(self, members: Collection[Member]) -> tuple[str, int] | None:
        """Without whom these hold nothing that is worth going on from: a living replica, and its step."""
        if not members or max(m.step for m in members) > 0:
            return None
        there = {m.replica_id for m in members}
        away = [(k.step, rid) for rid, k in self._living.items() if rid not in there and k.step > 0]
        if not away:
            return None
        step, replica_id = max(away)
        return replica_id, step

    def former(self, members: Iterable[Member]) -> int:
        """How far a job was of whose state these hold nothing; 0: there was none, or they go on from it."""
        return 0 if max(m.step for m in members) > 0 else self._furthest
