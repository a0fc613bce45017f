"""The values that the lighthouse's machines deal in: replicas, quorums, deaths, limits."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Death", "Member", "Options", "Outcome", "Quorum"]


@dataclass(frozen=True, slots=True)
class Member:
    """A replica group, as it describes itself when it asks for a quorum."""

    replica_id: str
    address: str = ""
    """Of the group's ManagerServer, ``http://host:port``."""
    store_address: str = ""
    """Of the group's TCPStore, ``host:port``."""
    step: int = 0
    """The newest step it has committed; below 0: it holds no usable state."""
    lineage: int = 0
    """Id of the quorum in which it, or whom it healed from, committed the newest step; 0: none, or not known."""
    world_size: int = 0
    """Ranks in the group; 0: not known."""
    shrink_only: bool = False
    """It asks that nobody new is taken in."""
    data: str = ""
    """JSON of the group's own."""
    commit_failures: int = 0
    """Steps in a row that it could not commit."""
    timed_out: bool = False
    """It waited for the others of its last step in vain."""
    attempt: int = 0
    """The same when a request is sent again because its answer may have been lost; 0: it has no number."""
    seen_step: int = 0
    """The furthest step it has seen the job at (:mod:`torchft.core.progress`)."""
    waits: bool = False
    """If it needs a state, it does not take one in this step: the way to those who have it is too slow."""
    standing: bool = False
    """It has a session and speaks standing quorums."""
    uses: int = 0
    """The id of the standing quorum that it could go on with; 0: there is none."""


@dataclass(frozen=True, slots=True)
class Quorum:
    """The members of the next step, sorted by replica id."""

    quorum_id: int
    participants: tuple[Member, ...]
    fenced: bool = False
    """All members keep leases: see rule 6 of the module's docstring."""
    stands: bool = False
    """Fenced, and all members are at the same step of one lineage: they may go on with it without asking."""
    former_step: int = 0
    """How far a job was of whose state no member holds anything; 0: there was none."""

    @property
    def replica_ids(self) -> tuple[str, ...]:
        return tuple(m.replica_id for m in self.participants)


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds."""

    min_replicas: int
    join_timeout: float = 0.1
    heartbeat_timeout: float = 5.0
    lease: float = 300.0
    """How long a member of a standing quorum goes on without hearing from the lighthouse."""

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas is {self.min_replicas}: a quorum needs at least one replica")
        if self.lease <= 0:
            raise ValueError(f"lease is {self.lease} s: it must be positive")
        if self.join_timeout < 0 or self.heartbeat_timeout <= 0:
            raise ValueError("join_timeout must not be negative and heartbeat_timeout must be positive")


@dataclass(frozen=True, slots=True)
class Death:
    """A replica that is no longer there."""

    replica_id: str
    cause: str
    quorum_id: int
    """Of the newest quorum then: it and all before it are broken if the replica is a member."""
    step: int = 0
    """It left in good order with all steps below this committed: who is not there yet loses nothing by it."""
    since: int = 0
    """The first of the newest quorums, without a gap, that it was in: those from here to ``quorum_id`` are broken."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the shell has to do after an event."""

    quorum: Quorum | None = None
    """Answer each member of it."""
    again: Quorum | None = None
    """Answer whoever asked just now, and nobody else, with the quorum that it is a member of already."""
    broken: Death | None = None
    """Tell everybody that a quorum is broken by this replica, which lives."""
    dead: tuple[Death, ...] = ()
    """Replicas that just turned from healthy to not."""
    status: str | None = None
    """The reason why there is (or is no) quorum, when it differs from the last one told."""
