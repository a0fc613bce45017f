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
    - The i-th recovering member is served by ``sources[(i + group_rank) mod n]``, the sources being the
      up-to-date that do not recover themselves.
    - Any source may serve any recovering member: each is told of at most :data:`MAX_SOURCES`, the one that serves
      it first, then those that follow in the circle, so that the load stays spread when not all are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchft.core.membership import Member, Quorum

__all__ = ["MAX_SOURCES", "AssignmentError", "Source", "View", "assign", "of_group", "up_to_date"]

MAX_SOURCES = 8
"""More than these would not make a transfer faster: any network is full before."""


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
    """Whom this group may take the state from, the assigned one first; empty when it does not heal."""
    recovering_replica_ranks: tuple[int, ...]
    """All members that heal."""
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


def assign(quorum: Quorum, replica_id: str, group_rank: int, init_sync: bool) -> View:
    """The view of ``replica_id``'s rank ``group_rank``.

    Raises:
        AssignmentError: the group is not in the quorum.
    """
    members: list[Member] = sorted(quorum.participants, key=lambda m: m.replica_id)
    ids = tuple(m.replica_id for m in members)
    if replica_id not in ids:
        raise AssignmentError(f"replica {replica_id!r} is not in quorum {quorum.quorum_id} of {list(ids)}")
    me = ids.index(replica_id)

    max_step = max(m.step for m in members)
    newest = up_to_date(members)
    primary = newest[group_rank % len(newest)]
    lineages = {members[i].lineage for i in newest}

    recovering = [i for i in range(len(members)) if i not in newest]
    if init_sync and max_step == 0:
        recovering = [i for i in range(len(members)) if i != primary]
    sources = [i for i in newest if i not in recovering]
    first_of = {dst: (i + group_rank) % len(sources) for i, dst in enumerate(recovering)}
    source_of = {dst: sources[first] for dst, first in first_of.items()}

    seen = max(m.seen_step for m in members)
    survived = seen > max(max_step, 0)
    source = source_of.get(me)
    mine = [] if source is None else [*sources[first_of[me] :], *sources[: first_of[me]]][:MAX_SOURCES]
    return View(
        quorum_id=quorum.quorum_id,
        replica_rank=me,
        replica_world_size=len(members),
        replica_ids=ids,
        store_address=members[primary].store_address,
        max_step=max_step,
        max_replica_rank=newest.index(me) if me in newest else None,
        max_world_size=len(newest),
        heal=source is not None,
        recover_src_replica_rank=source,
        recover_src_manager_address="" if source is None else members[source].address,
        recover_dst_replica_ranks=tuple(dst for dst, src in source_of.items() if src == me),
        recover_sources=tuple(Source(i, members[i].address) for i in mine),
        recovering_replica_ranks=tuple(recovering),
        lineage=lineages.pop() if len(lineages) == 1 else 0,
        commit_failures=max(m.commit_failures for m in members),
        lost_step=seen if survived else quorum.former_step,
        lost_by_survivor=survived,
    )
