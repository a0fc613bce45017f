"""A member's side of a standing quorum: may the next step begin, may this one commit? (:mod:`torchft.core.standing`)

The machine belongs to a group's rank 0. It hears all that the session brings and what becomes of the group's steps,
and answers two questions: :meth:`StandingMember.start` and :meth:`StandingMember.commit`. It keeps no time of its
own: ``now`` is in seconds on the member's clock, which goes on while its machine sleeps.

Invariants
    - A step is started standing at most once, and only right after the one before it committed.
    - Between an :class:`Ack` and what follows it (a decision, the end of the session) no step beyond the acked one's
      next is started; by a member alone, none beyond the acked one.
    - Nothing of a fenced quorum is started or committed after the lease.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torchft.core.standing import Ack, Announcement, Decide, Over, Prepare

__all__ = ["Grant", "MayCommit", "StandingMember", "Start"]

_UNANSWERED = 16
_LEASE_FRACTION = 20


@dataclass(frozen=True, slots=True)
class Grant:
    """What the answer to a quorum request says about the quorum itself."""

    quorum_id: int
    replica_rank: int
    size: int
    fenced: bool
    stands: bool


@dataclass(frozen=True, slots=True)
class Start:
    """The answer to "may the step begin without asking?"."""

    stands: bool
    why: str
    """For the log: why not."""


class MayCommit(enum.Enum):
    """The answer to "may the step commit?"."""

    YES = "yes"
    WAIT = "wait"
    """The lease has run out, and nothing is known against it: until the lighthouse answers, it may have given the
    quorum up. Ask again when it has, or vote no."""
    NO = "no"


class StandingMember:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._grant: Grant | None = None
        self._over = ""
        self._started = -1
        self._next: int | None = None  # the step that may stand: the one after the last that committed
        self._change = -1
        self._promise: int | None = None
        self._until: int | None = None
        self._lease = 0.0
        self._lone_lease = 0.0
        self._lease_from = float("-inf")
        self._beat = 0
        self._unanswered: dict[int, float] = {}

    # ---------------------------------------------------------- the session

    def announcement(self) -> Announcement | None:
        """What the next hello says; None: no quorum was entered yet."""
        grant = self._grant
        if grant is None:
            return None
        stands = grant.stands and not self._over
        return Announcement(grant.quorum_id, grant.replica_rank, grant.size, self._started, stands)

    def welcomed(self, lease: float, heartbeat_timeout: float, quorum_id: int, sent_at: float) -> None:
        """The lighthouse answered the hello.

        Args:
            lease, heartbeat_timeout: its own, in seconds; lease 0: it knows no standing quorums.
            quorum_id: the newest quorum, if this replica is in it and it is not over; else 0.
            sent_at: when the hello was sent.
        """
        self._lease, self._lone_lease = lease, heartbeat_timeout / 2
        self._renew(quorum_id, sent_at)

    def lost(self) -> None:
        """The session ended: a change that is under way is forgotten."""
        self._promise = self._until = None
        self._change = -1
        self._unanswered.clear()

    def beat(self, now: float) -> int:
        """A sign of life is sent. Returns the number that it carries; 0: no answer is needed."""
        if (
            self._grant is None
            or not self._grant.fenced
            or self._remaining(now) > self._limit() * (1 - 1 / _LEASE_FRACTION)
        ):
            return 0
        self._beat += 1
        self._unanswered[self._beat] = now
        if len(self._unanswered) > _UNANSWERED:
            del self._unanswered[next(iter(self._unanswered))]
        return self._beat

    def beat_answered(self, number: int, quorum_id: int) -> None:
        """The lighthouse heard the sign of life.

        Args:
            number: which one.
            quorum_id: as in :meth:`welcomed`.
        """
        sent_at = self._unanswered.pop(number, None)
        if sent_at is not None:
            self._renew(quorum_id, sent_at)

    def go_on(self, quorum_id: int, asked_at: float) -> None:
        """A quorum request was answered: there is no other one, go on with that.

        Args:
            quorum_id: which one.
            asked_at: when the request was sent.
        """
        self._renew(quorum_id, asked_at)

    def _renew(self, quorum_id: int, sent_at: float) -> None:
        if self._grant is not None and quorum_id == self._grant.quorum_id:
            self._lease_from = max(self._lease_from, sent_at)

    # --------------------------------------------------- what it is told

    def entered(self, grant: Grant, step: int, asked_at: float) -> None:
        """A quorum request was answered. To be called before anything that came after the answer is heard.

        Args:
            grant: what the answer says.
            step: the quorum's max step, that its members work on now.
            asked_at: when the request was sent.
        """
        self._grant, self._over = grant, ""
        self._started, self._next = step, None
        self._promise = self._until = None
        self._lease_from = asked_at
        self._unanswered.clear()

    def prepare(self, message: Prepare) -> Ack | None:
        """The lighthouse plans a change. Returns the answer; None: it is about another quorum."""
        if self._grant is None or message.quorum_id != self._grant.quorum_id or message.change < self._change:
            return None
        self._change = message.change
        self._promise, self._until = self._started, None
        return Ack(message.change, self._started)

    def decide(self, message: Decide) -> Ack | None:
        """A change is decided. Returns an answer only where it comes too late."""
        if self._grant is None or message.quorum_id != self._grant.quorum_id or message.change < self._change:
            return None
        if self._started >= message.step:
            return Ack(message.change, self._started)
        self._change = message.change
        self._promise, self._until = None, message.step
        return None

    def over(self, message: Over) -> bool:
        """Returns whether it is the quorum in use."""
        return self.notice(message.quorum_id, message.quorum_id, message.cause)

    def notice(self, member_since: int, quorum_id: int, cause: str) -> bool:
        """A replica is no longer there, or broke its quorum.

        Args:
            member_since: the first of the newest quorums, without a gap, that it was in.
            quorum_id: the newest of them.
            cause: for the log.

        Returns:
            Whether that is the quorum in use: then nothing more is started with it.
        """
        if self._grant is None or not member_since <= self._grant.quorum_id <= quorum_id:
            return False
        self._over = self._over or cause
        return True

    # ------------------------------------------------------------- the steps

    def start(self, step: int, now: float) -> Start:
        """May ``step`` begin with the quorum there is, without asking? If so, it has begun."""
        why = self._why_not(step, now)
        if why:
            return Start(False, why)
        self._started, self._next = step, None
        return Start(True, "")

    def _why_not(self, step: int, now: float) -> str:
        grant = self._grant
        if grant is None:
            return "there is no quorum yet"
        if not grant.stands:
            return f"quorum {grant.quorum_id} was for one step"
        if self._over:
            return f"quorum {grant.quorum_id} is over: {self._over}"
        if step != self._next:
            return "the step before it did not commit"
        if self._until is not None and step >= self._until:
            return f"the members change at step {self._until}"
        if self._promise is not None and step > self._promise + (grant.size > 1):
            return "a change of the members is being agreed on"
        if self._remaining(now) < 0:
            return f"the lighthouse has not answered for {now - self._lease_from:.1f} s"
        return ""

    def commit(self, now: float) -> MayCommit:
        """May the step under way commit? To be asked when all else has said yes."""
        if self._grant is None or not self._grant.fenced or self._remaining(now) >= 0:
            return MayCommit.YES
        return MayCommit.NO if self._over else MayCommit.WAIT

    def ended(self, step: int, committed: bool) -> None:
        """The step under way is over.

        Args:
            step: which one.
            committed: by all ranks of the group. If not, the next request says so.
        """
        if not committed:
            self._over = self._over or "a step was not committed"
        elif step == self._started:
            self._next = step + 1

    @property
    def quorum_id(self) -> int | None:
        """Of the quorum in use, or used last."""
        return None if self._grant is None else self._grant.quorum_id

    def uses(self, step: int) -> int:
        """For a quorum request: the standing quorum that this member could go on with at ``step``; 0: none."""
        grant = self._grant
        return grant.quorum_id if grant is not None and grant.stands and not self._over and step == self._next else 0

    def urgent(self, now: float) -> bool:
        """Whether a sign of life should be sent now, not when the next one is due: the lease is half over."""
        return self._grant is not None and self._grant.fenced and self._remaining(now) < self._limit() / 2

    def _limit(self) -> float:
        assert self._grant is not None
        return self._lease if self._grant.size > 1 else min(self._lease, self._lone_lease)

    def _remaining(self, now: float) -> float:
        return self._lease_from + self._limit() - now
