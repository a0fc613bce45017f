"""The wire forms of standing quorums: between the messages of proto/session.proto and :mod:`torchft.core.standing`.

What comes from the network is checked here, as in :mod:`torchft.coordination.types`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchft.coordination import types
from torchft.coordination.proto import session_pb2
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.core.assignment import AssignmentError, Seating, Source, View
from torchft.core.election import first_id
from torchft.core.membership import Member, Quorum
from torchft.core.standing import Ack, Announcement, Decide, Message, Over, Prepare
from torchft.core.standing_member import Grant

__all__ = [
    "MAX_RANKS",
    "GroupQuorum",
    "ack_from_wire",
    "ack_to_wire",
    "announcement_from_wire",
    "announcement_to_wire",
    "grant_from_wire",
    "grant_to_wire",
    "member_of",
    "message_from_wire",
    "message_to_wire",
]

MAX_RANKS = 4096
"""In a group: what asks for more views than this is refused."""


@dataclass(frozen=True)
class GroupQuorum:
    """The answer to a group's question: the views of its ranks, or the whole quorum, from which they follow."""

    replica_id: str
    views: tuple[View, ...] = ()
    quorum: Quorum | None = None

    @property
    def quorum_id(self) -> int:
        if self.quorum is not None:
            return self.quorum.quorum_id
        return self.views[0].quorum_id

    def view(self, rank: int, init_sync: bool) -> View:
        """Of one rank.

        Raises:
            AssignmentError: the quorum cannot be used by it.
        """
        if self.views:
            return self.views[rank]
        assert self.quorum is not None
        return Seating(self.quorum).view(self.replica_id, rank, init_sync)

    def stand(self, step: int) -> GroupQuorum:
        """The same quorum at a later step, with everybody at it."""
        return replace(self, views=tuple(_stand(view, step) for view in self.views))


def _stand(view: View, step: int) -> View:
    return replace(
        view,
        max_step=step,
        max_replica_rank=view.replica_rank,
        max_world_size=view.replica_world_size,
        heal=False,
        recover_src_replica_rank=None,
        recover_src_manager_address="",
        recover_dst_replica_ranks=(),
        recover_sources=(),
        recovering_replica_ranks=(),
        commit_failures=0,
        lineage=view.quorum_id,
        lost_step=0,
        lost_by_survivor=False,
    )


def member_of(message: session_pb2.Ready, replica_id: str, standing: bool) -> Member:
    """Who asks, on the session of ``replica_id``.

    Raises:
        ValueError: it makes no sense.
    """
    types.check_member(message.member)
    if message.member.replica_id != replica_id:
        raise ValueError(f"this is the session of {replica_id}, not of {message.member.replica_id}")
    if message.member.world_size > MAX_RANKS:
        raise ValueError(f"a group of {message.member.world_size} ranks: at most {MAX_RANKS} are served")
    return replace(types.member_from_wire(message.member), standing=standing, uses=message.uses)


def announcement_to_wire(announced: Announcement) -> session_pb2.Announcement:
    return session_pb2.Announcement(
        quorum_id=announced.quorum_id,
        replica_rank=announced.replica_rank,
        size=announced.size,
        step=announced.step,
        stands=announced.stands,
    )


def announcement_from_wire(hello: session_pb2.Hello) -> Announcement | None:
    """None: it uses no quorum, or none that can be: of an epoch that it has not seen itself."""
    a = hello.announced
    if not hello.standing or not hello.HasField("announced") or a.size < 1:
        return None
    if not 0 < a.quorum_id <= first_id(hello.epoch + 1) or abs(a.step) >= types.MAX_STEP:
        return None
    return Announcement(a.quorum_id, a.replica_rank, a.size, a.step, a.stands)


def grant_to_wire(seating: Seating, member: Member, init_sync: bool) -> session_pb2.Grant:
    """The views of a group's ranks.

    Raises:
        AssignmentError: the quorum cannot be used.
    """
    ranks = range(max(1, member.world_size))
    quorum = seating.quorum
    return session_pb2.Grant(
        views=[types.view_to_wire(seating.view(member.replica_id, rank, init_sync)) for rank in ranks],
        fenced=quorum.fenced,
        stands=quorum.stands,
    )


def grant_from_wire(message: session_pb2.Grant, world_size: int) -> tuple[Grant, tuple[View, ...]]:
    """What it means for the standing quorum, and the views.

    Raises:
        AssignmentError: they are not those of a group of this size.
    """
    if len(message.views) != world_size:
        raise AssignmentError(f"the lighthouse told {len(message.views)} views to a group of {world_size} ranks")
    views = tuple(_view_from_wire(view) for view in message.views)
    first = views[0]
    grant = Grant(first.quorum_id, first.replica_rank, first.replica_world_size, message.fenced, message.stands)
    return grant, views


def _view_from_wire(message: pb.ManagerQuorumResponse) -> View:
    def optional(name: str) -> int | None:
        return getattr(message, name) if message.HasField(name) else None

    return View(
        quorum_id=message.quorum_id,
        replica_rank=message.replica_rank,
        replica_world_size=message.replica_world_size,
        replica_ids=tuple(message.replica_ids),
        names=tuple(sorted(message.names.items())),
        store_address=message.store_address,
        max_step=message.max_step,
        max_replica_rank=optional("max_replica_rank"),
        max_world_size=message.max_world_size,
        heal=message.heal,
        recover_src_replica_rank=optional("recover_src_replica_rank"),
        recover_src_manager_address=message.recover_src_manager_address,
        recover_dst_replica_ranks=tuple(message.recover_dst_replica_ranks),
        recover_sources=tuple(Source(s.replica_rank, s.manager_address) for s in message.recover_sources),
        recovering_replica_ranks=tuple(message.recovering_replica_ranks),
        lineage=message.lineage,
        commit_failures=message.commit_failures,
        lost_step=message.lost_step,
        lost_by_survivor=message.lost_by_survivor,
    )


def ack_to_wire(ack: Ack) -> session_pb2.SessionUp:
    return session_pb2.SessionUp(ack=session_pb2.Ack(change=ack.change, step=ack.step))


def ack_from_wire(message: session_pb2.Ack) -> Ack | None:
    """None: it makes no sense."""
    return Ack(message.change, message.step) if abs(message.step) < types.MAX_STEP else None


def message_to_wire(message: Message) -> session_pb2.SessionDown:
    if isinstance(message, Prepare):
        prepare = session_pb2.Prepare(change=message.change, quorum_id=message.quorum_id)
        return session_pb2.SessionDown(prepare=prepare)
    if isinstance(message, Decide):
        decide = session_pb2.Decide(change=message.change, quorum_id=message.quorum_id, step=message.step)
        return session_pb2.SessionDown(decide=decide)
    return session_pb2.SessionDown(over=session_pb2.Over(quorum_id=message.quorum_id, cause=message.cause))


def message_from_wire(message: session_pb2.SessionDown) -> Message | None:
    """None: it is another kind of message."""
    kind = message.WhichOneof("kind")
    if kind == "prepare":
        return Prepare(message.prepare.change, message.prepare.quorum_id)
    if kind == "decide":
        return Decide(message.decide.change, message.decide.quorum_id, message.decide.step)
    if kind == "over":
        return Over(message.over.quorum_id, message.over.cause)
    return None
