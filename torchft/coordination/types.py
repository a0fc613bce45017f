"""The values that clients and servers of the control protocol hand out, and their wire forms.

The pure core has its own ``Member`` and ``Quorum``; the generated protobuf messages have theirs. This is the one
place where the three meet, and where what comes from the network is checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from torchft.coordination.proto import session_pb2
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.core import membership
from torchft.core.assignment import Source, View

__all__ = [
    "ANY_QUORUM",
    "MAX_STEP",
    "FailureNotification",
    "Notice",
    "Quorum",
    "QuorumMember",
    "QuorumResult",
    "check_member",
    "core_quorum",
    "describe",
    "encode_data",
    "member_from_wire",
    "member_to_wire",
    "quorum_from_wire",
    "quorum_to_wire",
    "result_from_wire",
    "view_to_result",
    "view_to_wire",
]

_MAX_TEXT = 64 * 1024

MAX_STEP = 2**62
"""Steps are below it: what follows from one still fits into the messages."""

ANY_QUORUM = 2**62
"""As the id in a notice: whichever quorum it is, it is broken."""


@dataclass(frozen=True)
class QuorumMember:
    """A replica group in a quorum, as it described itself."""

    replica_id: str
    address: str = ""
    """Of its ManagerServer, ``http://host:port``."""
    store_address: str = ""
    """Of its TCPStore, ``host:port``."""
    step: int = 0
    world_size: int = 1
    shrink_only: bool = False
    data: dict[str, Any] | None = None
    """What the member passed as ``data``; None when it passed nothing."""
    commit_failures: int = 0


@dataclass(frozen=True)
class Notice:
    """A replica that is no longer there, or that broke its quorum, as the members are told."""

    replica_id: str
    cause: str
    quorum_id: int
    """This quorum and all before it are broken if the replica is a member."""
    step: int = 0
    """It left in good order with all steps below this committed."""
    lives: bool = False
    """It is still there, but could not finish its step: its quorum is broken."""
    since: int = 0
    """The first of the newest quorums, without a gap, that it was in; 0: not told."""

    def __str__(self) -> str:
        what = "breaks its quorum" if self.lives else "is no longer there"
        return f"replica {self.replica_id} {what}: {self.cause}"

    @classmethod
    def from_wire(cls, message: session_pb2.Notice) -> Notice:
        return cls(message.replica_id, message.cause, message.quorum_id, message.step, message.lives, message.since)

    def to_wire(self) -> session_pb2.SessionDown:
        return session_pb2.SessionDown(
            notice=session_pb2.Notice(
                replica_id=self.replica_id,
                cause=self.cause,
                quorum_id=self.quorum_id,
                step=self.step,
                lives=self.lives,
                since=self.since,
            )
        )


@dataclass(frozen=True)
class Quorum:
    """The members of a step, sorted by replica id."""

    quorum_id: int
    participants: list[QuorumMember]
    created: datetime


@dataclass
class QuorumResult:
    """A quorum as one rank of one group sees it (docs/protocol.md, *Manager server*)."""

    quorum_id: int = 0
    replica_rank: int = 0
    replica_world_size: int = 1
    recover_src_manager_address: str = ""
    recover_src_replica_rank: int | None = None
    recover_dst_replica_ranks: list[int] = field(default_factory=list)
    store_address: str = ""
    max_step: int = 0
    max_replica_rank: int | None = None
    max_world_size: int = 1
    heal: bool = False
    commit_failures: int = 0
    replica_ids: list[str] = field(default_factory=list)
    recover_sources: list[Source] = field(default_factory=list)
    """Whom this group may take the state from, the assigned one first; also if it waits."""
    recovering_replica_ranks: list[int] = field(default_factory=list)
    """All members that heal."""
    names: dict[int, str] = field(default_factory=dict)
    """In a large quorum, instead of ``replica_ids``: those that this group deals with, by replica rank."""
    lineage: int = 0
    """Of the state that whoever heals takes over; 0: not known."""
    lost_step: int = 0
    """The job was at this step, and no member holds its state; 0: nothing is lost."""
    lost_by_survivor: bool = False
    """A member was there when it was."""

    @property
    def waits(self) -> bool:
        """This group needs a state, and takes none in this step, as it said itself."""
        return bool(self.recover_sources) and not self.heal

    def name(self, replica_rank: int) -> str:
        """The replica id of a member, as far as it is told: in a large quorum only of those this group deals with."""
        if self.replica_ids:
            return self.replica_ids[replica_rank]
        return self.names.get(replica_rank, f"replica rank {replica_rank} of quorum {self.quorum_id}")


@dataclass(frozen=True)
class FailureNotification:
    """A replica that the lighthouse no longer counts as alive, and why."""

    replica_id: str
    error_message: str


def encode_data(data: object) -> str:
    """``data`` of a quorum request as the JSON that travels; None is the empty text.

    Raises:
        ValueError: it cannot be written as JSON.
    """
    if data is None:
        return ""
    try:
        return json.dumps(data)
    except (TypeError, ValueError) as e:
        raise ValueError(f"data of a quorum request must be JSON-serialisable: {e}") from e


def _decode_data(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        value: dict[str, Any] | None = json.loads(text)
    except (ValueError, RecursionError):
        return None  # a foreign member's own business: nothing here depends on it
    return value


def check_member(member: pb.QuorumMember) -> None:
    """Refuses a member that cannot be one.

    Raises:
        ValueError: says which field and why.
    """
    if not member.replica_id:
        raise ValueError("replica_id is empty")
    for name in ("replica_id", "address", "store_address", "data"):
        if len(getattr(member, name)) > _MAX_TEXT:
            raise ValueError(f"{name} is longer than {_MAX_TEXT} characters")
    if abs(member.step) >= MAX_STEP:
        raise ValueError(f"step is {member.step}")
    if member.commit_failures < 0:
        raise ValueError(f"commit_failures is {member.commit_failures}")
    if member.lineage < 0:
        raise ValueError(f"lineage is {member.lineage}")


def member_from_wire(member: pb.QuorumMember) -> membership.Member:
    return membership.Member(
        replica_id=member.replica_id,
        address=member.address,
        store_address=member.store_address,
        step=member.step,
        world_size=member.world_size,
        shrink_only=member.shrink_only,
        data=member.data,
        commit_failures=member.commit_failures,
        timed_out=member.timed_out,
        attempt=member.attempt,
        lineage=member.lineage,
        seen_step=member.seen_step,
        waits=member.waits,
    )


def member_to_wire(member: membership.Member) -> pb.QuorumMember:
    return pb.QuorumMember(
        replica_id=member.replica_id,
        address=member.address,
        store_address=member.store_address,
        step=member.step,
        world_size=member.world_size,
        shrink_only=member.shrink_only,
        data=member.data,
        commit_failures=member.commit_failures,
        timed_out=member.timed_out,
        attempt=member.attempt,
        lineage=member.lineage,
        seen_step=member.seen_step,
        waits=member.waits,
    )


def quorum_to_wire(quorum: membership.Quorum, created: float) -> pb.Quorum:
    """``created`` is wall-clock time, Unix seconds."""
    message = pb.Quorum(
        quorum_id=quorum.quorum_id,
        participants=[member_to_wire(m) for m in quorum.participants],
        former_step=quorum.former_step,
    )
    message.created.FromNanoseconds(int(created * 1e9))
    return message


def quorum_from_wire(quorum: pb.Quorum) -> Quorum:
    return Quorum(
        quorum_id=quorum.quorum_id,
        participants=[
            QuorumMember(
                replica_id=m.replica_id,
                address=m.address,
                store_address=m.store_address,
                step=m.step,
                world_size=m.world_size,
                shrink_only=m.shrink_only,
                data=_decode_data(m.data),
                commit_failures=m.commit_failures,
            )
            for m in quorum.participants
        ],
        created=quorum.created.ToDatetime(tzinfo=UTC),
    )


def core_quorum(quorum: pb.Quorum) -> membership.Quorum:
    """The wire form as the core's."""
    members = tuple(member_from_wire(m) for m in quorum.participants)
    return membership.Quorum(quorum.quorum_id, members, former_step=quorum.former_step)


def view_to_result(view: View) -> QuorumResult:
    return QuorumResult(
        quorum_id=view.quorum_id,
        replica_rank=view.replica_rank,
        replica_world_size=view.replica_world_size,
        recover_src_manager_address=view.recover_src_manager_address,
        recover_src_replica_rank=view.recover_src_replica_rank,
        recover_dst_replica_ranks=list(view.recover_dst_replica_ranks),
        store_address=view.store_address,
        max_step=view.max_step,
        max_replica_rank=view.max_replica_rank,
        max_world_size=view.max_world_size,
        heal=view.heal,
        commit_failures=view.commit_failures,
        replica_ids=list(view.replica_ids),
        recover_sources=list(view.recover_sources),
        recovering_replica_ranks=list(view.recovering_replica_ranks),
        lineage=view.lineage,
        lost_step=view.lost_step,
        lost_by_survivor=view.lost_by_survivor,
        names=dict(view.names),
    )


def view_to_wire(view: View) -> pb.ManagerQuorumResponse:
    return pb.ManagerQuorumResponse(
        quorum_id=view.quorum_id,
        recover_src_manager_address=view.recover_src_manager_address,
        recover_src_replica_rank=view.recover_src_replica_rank,
        recover_dst_replica_ranks=view.recover_dst_replica_ranks,
        store_address=view.store_address,
        max_step=view.max_step,
        max_replica_rank=view.max_replica_rank,
        max_world_size=view.max_world_size,
        replica_rank=view.replica_rank,
        replica_world_size=view.replica_world_size,
        heal=view.heal,
        commit_failures=view.commit_failures,
        replica_ids=view.replica_ids,
        recover_sources=[
            pb.RecoverSource(replica_rank=s.replica_rank, manager_address=s.manager_address)
            for s in view.recover_sources
        ],
        recovering_replica_ranks=view.recovering_replica_ranks,
        lineage=view.lineage,
        lost_step=view.lost_step,
        lost_by_survivor=view.lost_by_survivor,
        names=dict(view.names),
    )


def result_from_wire(response: pb.ManagerQuorumResponse) -> QuorumResult:
    optional = {
        name: getattr(response, name) if response.HasField(name) else None
        for name in ("recover_src_replica_rank", "max_replica_rank")
    }
    return QuorumResult(
        quorum_id=response.quorum_id,
        replica_rank=response.replica_rank,
        replica_world_size=response.replica_world_size,
        recover_src_manager_address=response.recover_src_manager_address,
        recover_src_replica_rank=optional["recover_src_replica_rank"],
        recover_dst_replica_ranks=list(response.recover_dst_replica_ranks),
        store_address=response.store_address,
        max_step=response.max_step,
        max_replica_rank=optional["max_replica_rank"],
        max_world_size=response.max_world_size,
        heal=response.heal,
        commit_failures=response.commit_failures,
        replica_ids=list(response.replica_ids),
        recover_sources=[Source(s.replica_rank, s.manager_address) for s in response.recover_sources],
        recovering_replica_ranks=list(response.recovering_replica_ranks),
        lineage=response.lineage,
        lost_step=response.lost_step,
        lost_by_survivor=response.lost_by_survivor,
        names=dict(response.names),
    )


def describe(quorum: pb.Quorum) -> str:
    """A quorum as one line of a log."""
    members = ", ".join(
        f'QuorumMember {{ replica_id: "{m.replica_id}", address: "{m.address}", '
        f'store_address: "{m.store_address}", step: {m.step}, world_size: {m.world_size}, '
        f"shrink_only: {str(m.shrink_only).lower()}, commit_failures: {m.commit_failures}, "
        f'data: "{m.data}" }}'
        for m in quorum.participants
    )
    created = f"Timestamp {{ seconds: {quorum.created.seconds}, nanos: {quorum.created.nanos} }}"
    return (
        f"LighthouseQuorumResponse {{ quorum: Some(Quorum {{ quorum_id: {quorum.quorum_id}, "
        f"participants: [{members}], created: Some({created}) }}) }}"
    )
