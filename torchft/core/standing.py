"""What the two sides of a standing quorum tell each other (docs/protocol.md, part 2: *Standing quorum*).

The idea
    A quorum whose members all keep sessions and are all at the same step *stands*: they go on with it, step after
    step, without asking anybody. That is safe because a quorum of two or more progresses only if all its members
    take part in each collective: two quorums that share a member never both progress. What is left to exclude is a
    quorum without any of them while they live, cut off. That is what leases are for.

Rules
    1. *Standing step.* A member starts step k+1 without asking if step k committed, no change is agreed for a step
       <= k+1, it has promised nothing else, no notice says that its quorum is over, and its lease holds.
    2. *Lease.* A member starts and commits steps of a fenced quorum only within ``lease`` of the sending of its last
       word that was answered "your quorum still is the newest"; alone in its quorum, within half of
       ``heartbeat_timeout``. It counts on its own clock, which goes on while its machine sleeps.
    3. *Takeover.* The lighthouse forms a quorum without any member of the last one only when each of them is known
       to be dead, or has been silent for ``lease + heartbeat_timeout`` (a last quorum of one: ``heartbeat_timeout``).
    4. *Planned change.* To take somebody in, the lighthouse sends *prepare* to all members. Each answers with the
       newest step s that it has started, and promises to start none beyond s+1 before a decision. With all answers
       in, it sends *decide*: S = max(s) + 2. Steps below S stand; at S all ask. A member alone has nobody to keep
       in step with: it promises to start none beyond s, and S = s + 1.
    5. A member whose session ends forgets promise and decision. If it so passes S, it says so when it hears of S
       again, and the change begins anew: those who wait at S are told to go on.
    6. A member that asks although its quorum stands is part of a planned change that its asking begins.
    7. *Restart.* A lighthouse that knows of no quorum takes on (*adopts*) the one that members announce in their
       hellos, and forms none itself until all its members have, or ``heartbeat_timeout`` has passed.

Quorum ids are ``epoch * 2**32 + n``: an epoch is used by one life of a lighthouse only.

The lighthouse's side is :mod:`torchft.core.standing_lighthouse`, a member's :mod:`torchft.core.standing_member`. They
meet in nothing but the messages below, in the order in which they were sent within one session.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchft.core.membership import Outcome

__all__ = ["Ack", "Announcement", "Decide", "Message", "Orders", "Over", "Prepare"]


@dataclass(frozen=True, slots=True)
class Announcement:
    """In a member's hello: the quorum that it uses."""

    quorum_id: int
    replica_rank: int
    size: int
    """Members of the quorum."""
    step: int
    """The newest step it has started."""
    stands: bool
    """As far as it knows the quorum stands; False: it is in use for one step, or is over."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """The lighthouse wants to change the quorum: how far are you?"""

    change: int
    """A number of this attempt."""
    quorum_id: int


@dataclass(frozen=True, slots=True)
class Ack:
    """A member's answer to :class:`Prepare`; to a :class:`Decide` that comes too late."""

    change: int
    step: int
    """The newest step it has started. It starts none beyond the next one before it hears a decision; alone, none."""


@dataclass(frozen=True, slots=True)
class Decide:
    """Steps below ``step`` stand; at ``step`` all ask."""

    change: int
    quorum_id: int
    step: int


@dataclass(frozen=True, slots=True)
class Over:
    """The quorum that a member announced is not (any more) one to go on with."""

    quorum_id: int
    cause: str


Message = Prepare | Decide | Over


@dataclass(frozen=True, slots=True)
class Orders:
    """What the lighthouse's shell has to do after an event, in this order."""

    outcomes: tuple[Outcome, ...] = ()
    """Of the membership, to be carried out one after the other."""
    tell: tuple[tuple[str, Message], ...] = ()
    """To whom, on its session, and what. Who has no session just then is told when it is back."""
    released: tuple[str, ...] = ()
    """Replicas whose question is over without a quorum: they go on with the one they have. ``tell`` says why."""
