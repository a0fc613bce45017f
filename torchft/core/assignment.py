"""A quorum seen by one rank of one group (docs/protocol.md, part 1: *Manager server*).

The idea
    Every rank computes the same facts from the same quorum, so nobody has to be told them: who is ahead, who
    recovers, from whom, and where the process group meets.

Rules, with the members sorted by replica id
    - ``max_step`` over the members; the *up-to-date* are those at it. Below 0 no member holds usable state.
    - Histories can part: a member that commits a step while the others give it up, and is then cut off, comes back
      at a step that they have committed without it. So where those at ``max_step`` tell different *lineages*, only
      those of the newest are up to date (decision 10). One lineage at one step is one state.
    - A state is *lost* when the job was further than ``max_step``: as a member has seen, which then is a survivor, or,
      where ``max_step`` is not above 0, as only the lighthouse remembers. The Manager decides what to do about it.
    - The *primary* is ``up_to_date[group_rank mod n]``: its store hosts the rendezvous, and spreading it by group
      rank spreads the load.
    - *Recovering* are the members that are not up to date; and, when ``init_sync`` and ``max_step`` is 0, all but the
      primary, so that all begin from one initialisation.
    - Of these, who says that it *waits* takes no state in this step: nobody serves it, and it does not count as
      recovering. It is told whom it may measure the way to.
    - The i-th recovering member is served by ``sources[(i + group_rank) mod n]``, the sources being the
      up-to-date that do not recover themselves.
    - Any source may serve any recovering member: each is told of at most :data:`MAX_SOURCES`, the one that serves
      it first, then those that follow in the circle, so that the load stays spread when not all are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchft.core.membership import Member, Quorum

__all__ = [
    "MAX_SOURCES",
    "NAMES_OF_ALL",
    "AssignmentError",
    "Seating",
    "Source",
    "View",
    "assign",
    "of_group",
    "up_to_date",
]

MAX_SOURCES = 8
"""More than these would not make a transfer faster: any network is full before."""

NAMES_OF_ALL = 64
"""In a larger quorum a view names only those that it deals with, so that all views together grow with its size only."""


class AssignmentError(Exception):
    """The quorum cannot be used by this rank. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A member that a recovering one can take the state from."""

    replica_rank: int
    manager_address: str


@dataclass(frozen=True, slots=True)
class View:
    """What one rank of one group needs to know of a quorum."""

    quorum_id: int
    replica_rank: int
    replica_world_size: int
    replica_ids: tuple[str, ...]
    """Of all members; empty in a large quorum."""
    names: tuple[tuple[int, str], ...]
    """In a large quorum: replica rank and id of itself and those it gives to or may take from."""
    store_address: str
    max_step: int
    max_replica_rank: int | None
    """Index among the up-to-date; None when this group is not one of them."""
    max_world_size: int
    heal: bool
    recover_src_replica_rank: int | None
    recover_src_manager_address: str
    recover_dst_replica_ranks: tuple[int, ...]
    recover_sources: tuple[Source, ...]
    """Whom this group may take the state from, the assigned one first; not empty when it heals, or waits to."""
    recovering_replica_ranks: tuple[int, ...]
    """All members that heal in this step."""
    lineage: int
    """Of the state that the up-to-date hold, and that whoever heals takes over; 0: not known."""
    commit_failures: int
    """The most failures in a row of any member."""
    lost_step: int
    """The job was at this step, and no member holds its state; 0: nothing is lost."""
    lost_by_survivor: bool
    """A member was there when it was."""


def up_to_date(members: Sequence[Member]) -> list[int]:
    """The indices of those that hold the newest state. They all hold the same.

    Where one of those at the newest step does not tell its lineage, nothing can be said, and all of them count.
    """
    max_step = max(m.step for m in members)
    newest = [i for i, m in enumerate(members) if m.step == max_step]
    lineages = [members[i].lineage for i in newest]
    return newest if 0 in lineages else [i for i in newest if members[i].lineage == max(lineages)]


def of_group(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """A group's step and lineage, from those of its ranks.

    Ranks at different steps, or of different lineages, hold parts of different states: together they have none. That
    happens when a vote's answer or a heal reached only some of them.
    """
    states = set(ranks)
    return states.pop() if len(states) == 1 else (-1, 0)


class Seating:
    """A quorum prepared for many views: what all of them need is computed once, each view in its own size.

    Args:
        quorum: of any number of members.
    """

    def __init__(self, quorum: Quorum) -> None:
        self.quorum = quorum
        self._members = sorted(quorum.participants, key=lambda m: m.replica_id)
        self._ids = tuple(m.replica_id for m in self._members)
        self._index = {rid: i for i, rid in enumerate(self._ids)}
        self._max_step = max(m.step for m in self._members)
        self._failures = max(m.commit_failures for m in self._members)
        self._newest = up_to_date(self._members)
        self._newest_index = {i: n for n, i in enumerate(self._newest)}
        lineages = {self._members[i].lineage for i in self._newest}
        self._lineage = lineages.pop() if len(lineages) == 1 else 0
        self._heals: dict[int | None, _Heals] = {}
        seen = max(m.seen_step for m in self._members)
        self._survived = seen > max(self._max_step, 0)
        self._lost_step = seen if self._survived else quorum.former_step

    def view(self, replica_id: str, group_rank: int, init_sync: bool) -> View:
        """The view of ``replica_id``'s rank ``group_rank``.

        Raises:
            AssignmentError: the group is not in the quorum.
        """
        me = self._index.get(replica_id)
        if me is None:
            some = list(self._ids[:32])
            raise AssignmentError(f"replica {replica_id!r} is not in quorum {self.quorum.quorum_id} of {some}")
        primary = self._newest[group_rank % len(self._newest)]
        heals = self._heals_of(primary if init_sync and self._max_step == 0 else None)
        n = len(heals.sources)
        source: int | None = None
        dsts: tuple[int, ...] = ()
        candidates: list[int] = []
        mine = heals.recovering_index.get(me, heals.waiting_index.get(me))
        if mine is not None:
            candidates = [heals.sources[(mine + group_rank + k) % n] for k in range(min(n, MAX_SOURCES))]
            source = candidates[0] if me in heals.recovering_index else None
        elif (place := heals.sources_index.get(me)) is not None:
            dsts = heals.recovering[(place - group_rank) % n :: n]
        whole = len(self._ids) <= NAMES_OF_ALL
        return View(
            quorum_id=self.quorum.quorum_id,
            replica_rank=me,
            replica_world_size=len(self._ids),
            replica_ids=self._ids if whole else (),
            names=() if whole else tuple((i, self._ids[i]) for i in (me, *candidates, *dsts)),
            store_address=self._members[primary].store_address,
            max_step=self._max_step,
            max_replica_rank=self._newest_index.get(me),
            max_world_size=len(self._newest),
            heal=source is not None,
            recover_src_replica_rank=source,
            recover_src_manager_address="" if source is None else self._members[source].address,
            recover_dst_replica_ranks=dsts,
            recover_sources=tuple(Source(i, self._members[i].address) for i in candidates),
            recovering_replica_ranks=heals.recovering,
            lineage=self._lineage,
            commit_failures=self._failures,
            lost_step=self._lost_step,
            lost_by_survivor=self._survived,
        )

    def _heals_of(self, primary: int | None) -> _Heals:
        """Who heals: all but the primary, or with None those that are not up to date."""
        heals = self._heals.get(primary)
        if heals is None:
            stay = self._newest_index if primary is None else {primary: 0}
            behind = [i for i in range(len(self._ids)) if i not in stay]
            waiting = tuple(i for i in behind if self._members[i].waits)
            recovering = tuple(i for i in behind if not self._members[i].waits)
            sources = tuple(i for i in self._newest if i in stay)
            heals = self._heals[primary] = _Heals(recovering, waiting, sources)
        return heals


class _Heals:
    """Who heals in a quorum, who waits to, and who may serve them."""

    def __init__(self, recovering: tuple[int, ...], waiting: tuple[int, ...], sources: tuple[int, ...]) -> None:
        self.recovering = recovering
        self.sources = sources
        self.recovering_index = {i: n for n, i in enumerate(recovering)}
        self.waiting_index = {i: n for n, i in enumerate(waiting)}
        self.sources_index = {i: n for n, i in enumerate(sources)}


def assign(quorum: Quorum, replica_id: str, group_rank: int, init_sync: bool) -> View:
    """The view of ``replica_id``'s rank ``group_rank``; :class:`Seating` for more than one.

    Raises:
        AssignmentError: the group is not in the quorum.
    """
    return Seating(quorum).view(replica_id, group_rank, init_sync)
