"""Which lighthouse may answer, and what an epoch means (docs/protocol.md: *Epochs and standbys*).

The idea
    An *epoch* is one reign of one lighthouse. Its number comes from a durable record that only ever grows: a file
    of a lighthouse that is alone, or a *register* (etcd) that several share, in which at most one of them, the
    leader, holds the seat on a lease. All quorum ids of an epoch are ``epoch * 2**32 + n``, so no id is ever used
    twice, whatever else is forgotten.

    Two things keep a lighthouse that was deposed without knowing it (stopped, cut off) from doing harm. By its own
    clock it stops answering before the register can have given its seat away. And should its clock lie, those who
    have heard of a newer epoch refuse it.

Rules
    1. Each reign has an epoch of its own, one above all that the register and the members have ever named. Taking
       the seat and raising the epoch are one atomic act in the register.
    2. A leader may answer until ``lease`` after it *sent* the last renewal that was granted, less a margin for
       clocks of different speed. The register counts from when the renewal came, which is later.
    3. A reign that is over stays over: no late answer of the register brings it back. Ruling again is a new epoch.
    4. Who hears from a member of a higher epoch than its own is deposed, at once.
    5. A seat in my name that I do not rule by (my answer was lost, or my clock ran out first) is given back.
    6. The seat of a leader whose process has been proven dead is vacated without waiting for its lease.
    7. A member keeps the highest epoch it has seen and refuses all answers of lower ones.

Invariants
    - ``leads(now)`` never turns from False to True within an epoch.
    - No two candidates ever lead in the same epoch; and none at the same time, while clocks differ by less than
      the margin.
    - One order to the register at a time is under way for each candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "MAX_EPOCH",
    "Began",
    "Candidate",
    "Ended",
    "EpochGuard",
    "Holder",
    "LastQuorum",
    "LeaseOptions",
    "Op",
    "Order",
    "Register",
    "first_id",
    "plausible",
]

_ID_BITS = 32

MAX_EPOCH = 2**30 - 1
"""Ids stay below 2**62."""

_FARTHEST = 2**20
"""Nobody is this many epochs behind the truth: a larger claim is garbage."""


def first_id(epoch: int) -> int:
    """The last id before those of this epoch: its quorums count on from here."""
    return epoch << _ID_BITS


def plausible(claimed: int, mine: int) -> bool:
    """Whether an epoch that comes from the network can be one.

    Args:
        claimed: the number in the message.
        mine: the highest that is known here.
    """
    return 0 <= claimed <= min(MAX_EPOCH - 1, mine + _FARTHEST)


@dataclass(frozen=True, slots=True)
class LastQuorum:
    """The newest quorum whose members may go on without being heard of, as the next lighthouse has to know it."""

    quorum_id: int
    members: tuple[tuple[str, str], ...]
    """Of each its replica id, and its life address where that was seen to accept, else an empty text."""


class EpochGuard:
    """What a member remembers of epochs (rule 7). 0: nothing seen yet, or lighthouses that have none."""

    def __init__(self) -> None:
        self.highest = 0

    def admit(self, epoch: int) -> bool:
        """Whether an answer of this epoch may be believed. The highest one is remembered."""
        known = self.highest or MAX_EPOCH  # whoever has seen nothing has nothing to compare the first answer with
        if epoch < self.highest or not plausible(epoch, known):
            return False
        self.highest = epoch
        return True


@dataclass(frozen=True, slots=True)
class LeaseOptions:
    """Times in seconds."""

    lease: float = 5.0
    """How long the register keeps a seat whose holder says nothing."""
    drift: float = 0.1
    """The part of the lease that is given up for clocks that run at different speeds."""

    def __post_init__(self) -> None:
        if self.lease <= 0 or not 0 <= self.drift < 0.5:
            raise ValueError("a lease must be positive, and its margin less than half of it")

    @property
    def valid(self) -> float:
        """How long after a granted request was sent its sender may rule."""
        return self.lease * (1 - self.drift)

    @property
    def renewing(self) -> float:
        """Between renewals: three can fail before the reign ends."""
        return self.lease / 5

    @property
    def looking(self) -> float:
        """Between a standby's looks at the register."""
        return min(0.5, self.lease / 20)

    @property
    def patience(self) -> float:
        """How long one request to the register may take."""
        return self.lease / 5


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has the seat."""

    name: str
    """Of the candidate, unique to one life of it."""
    address: str
    """``http://host:port`` for members."""
    life_address: str
    """``host:port`` that is open as long as its process lives."""
    epoch: int
    lease: int
    """The register's number of its lease."""


@dataclass(frozen=True, slots=True)
class Register:
    """What the register holds, in one look."""

    epoch: int
    """The newest one; 0: there was none yet."""
    holder: Holder | None


class Op(Enum):
    """What can be asked of a register."""

    LOOK = "look"
    CAMPAIGN = "take the seat, if it is free and the epoch is still the expected one"
    RENEW = "keep the lease"
    VACATE = "end the lease, and with it the holder's seat"


@dataclass(frozen=True, slots=True)
class Order:
    """One request to the register, to be sent now."""

    op: Op
    lease: int = 0
    """RENEW, VACATE: which."""
    expected: int = 0
    """CAMPAIGN: the register's epoch when it was last looked at."""
    epoch: int = 0
    """CAMPAIGN: the one to take."""


@dataclass(frozen=True, slots=True)
class Began:
    """From now on this candidate leads."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Ended:
    """From now on it does not."""

    epoch: int
    cause: str


@dataclass(slots=True)
class _Reign:
    epoch: int
    lease: int
    until: float
    renew_at: float


class Candidate:
    """One lighthouse among those that share a register.

    The shell asks :meth:`next` what to send to the register and when, sends one order at a time, and tells the
    outcome by :meth:`looked`, :meth:`campaigned`, :meth:`renewed`, :meth:`vacated` or :meth:`unreachable`. All
    times are of this candidate's own clock, which must go on while the process is stopped.

    Args:
        name: unique to this life of the lighthouse.
        options: the lease.
    """

    def __init__(self, name: str, options: LeaseOptions) -> None:
        self.name = name
        self.options = options
        self.holder: Holder | None = None
        """As last seen, or oneself."""
        self._seen: Register | None = None  # since the last attempt to take the seat
        self._floor = 0
        self._reign: _Reign | None = None
        self._vacate = 0
        self._at = 0.0  # when the next order is due, while not leading

    # ------------------------------------------------------------ queries

    def leads(self, now: float) -> bool:
        """Whether it may answer at this moment."""
        return self._reign is not None and now < self._reign.until

    @property
    def epoch(self) -> int:
        """Of its reign, or 0."""
        return 0 if self._reign is None else self._reign.epoch

    @property
    def highest(self) -> int:
        """The highest epoch it has heard of."""
        return max(self._floor, self.epoch, 0 if self._seen is None else self._seen.epoch)

    def next(self, now: float) -> tuple[Order | None, float]:
        """The order that is due now, or None and the time when to ask again at the latest."""
        reign = self._reign
        if reign is not None:
            if now < reign.renew_at:
                return None, min(reign.renew_at, reign.until)
            return Order(Op.RENEW, lease=reign.lease), now
        if self._vacate:
            return Order(Op.VACATE, lease=self._vacate), now
        if self._seen is not None and self._seen.holder is None:
            return Order(Op.CAMPAIGN, expected=self._seen.epoch, epoch=self.highest + 1), now
        return (Order(Op.LOOK), now) if now >= self._at else (None, self._at)

    # ------------------------------------------- what the register answered

    def looked(self, seen: Register, now: float) -> None:
        """LOOK was answered."""
        self._seen, self.holder = seen, seen.holder
        self._floor = max(self._floor, seen.epoch)
        self._at = now + self.options.looking
        if self._reign is None and seen.holder is not None and seen.holder.name == self.name:
            self._vacate, self.holder = seen.holder.lease, None  # rule 5

    def campaigned(self, holder: Holder | None, sent_at: float, now: float) -> Began | None:
        """CAMPAIGN was answered.

        Args:
            holder: oneself, with the new lease; None: somebody was faster.
            sent_at: when the lease was asked for.
        """
        self._seen = None
        self._at = now
        if holder is None:
            return None
        until = sent_at + self.options.valid
        if now >= until or holder.epoch < self._floor:
            self._vacate = holder.lease
            return None
        self._reign = _Reign(holder.epoch, holder.lease, until, sent_at + self.options.renewing)
        self._floor = holder.epoch
        self.holder = holder
        return Began(holder.epoch)

    def renewed(self, granted: bool, sent_at: float, now: float) -> Ended | None:
        """RENEW was answered.

        Args:
            granted: the lease lived, and lives on from when the request came.
            sent_at: when the request was sent.
        """
        ended = self.tick(now)
        if ended is not None or self._reign is None:
            return ended
        if not granted:
            return self._end("the register has ended its lease", now)
        self._reign.until = max(self._reign.until, sent_at + self.options.valid)
        self._reign.renew_at = sent_at + self.options.renewing
        return None

    def vacated(self, now: float) -> None:
        """VACATE was answered: that lease is no more, or was none."""
        self._vacate = 0
        self._seen = None
        self._at = now

    def unreachable(self, now: float) -> Ended | None:
        """An order was not answered, or not in time; whether it was carried out is not known."""
        self._seen = None
        self._at = now + self.options.looking
        if self._reign is not None:
            self._reign.renew_at = now + self.options.looking
        return self.tick(now)

    # ------------------------------------------------------- other events

    def tick(self, now: float) -> Ended | None:
        """Time has passed."""
        if self._reign is None or now < self._reign.until:
            return None
        return self._end(f"its lease of {self.options.lease:g} s may have run out: the register was not reached", now)

    def told(self, epoch: int, now: float) -> Ended | None:
        """Somebody has seen this epoch, which is plausible."""
        self._floor = max(self._floor, epoch)
        if self._reign is None or epoch <= self._reign.epoch:
            return None
        return self._end(f"epoch {epoch} has begun elsewhere", now)

    def proven_dead(self, holder: Holder, now: float) -> None:
        """The process of this holder of the seat has ended (rule 6)."""
        if self._reign is None and self.holder == holder:
            self._vacate = holder.lease

    def resign(self, now: float) -> Ended | None:
        """This candidate goes. The order that follows gives its seat back, if it has one."""
        return None if self._reign is None else self._end("it ends", now)

    def _end(self, cause: str, now: float) -> Ended:
        reign = self._reign
        assert reign is not None
        self._reign = None
        self._seen = self.holder = None
        self._vacate = reign.lease  # if it is still there, others need not wait for its end
        self._at = now
        return Ended(reign.epoch, cause)
