"""The lighthouse's side of standing quorums (:mod:`torchft.core.standing`), around a :class:`Membership`.

The idea
    The membership decides who is alive and when a quorum forms, as if all asked at each step. This machine stands
    before it: as long as a quorum stands its members need not ask, and those of them that do are *parked*: the
    membership does not see them until the quorum is over or the agreed step has come.

A quorum's life
    ``standing`` → (somebody wants in, drains, or asks) → ``preparing`` → (all have answered) → ``decided`` → (all that
    live ask at the agreed step, or have had ``heartbeat_timeout`` since the first) → the next quorum forms.
    A death or a member that could not commit ends it from any of these: everybody is told, asks, and is seen by the
    membership at once.

Invariants
    - While a quorum stands, none forms that would leave out a member of it that lives.
    - A decision is told only when each member has answered, and S is beyond all that any of them may have started.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torchft.core.membership import Member, Membership, Options, Outcome, Quorum
from torchft.core.standing import Announcement, Decide, Message, Orders, Over, Prepare

__all__ = ["StandingLighthouse"]


@dataclass
class _Change:
    number: int
    acks: dict[str, int] = field(default_factory=dict)
    step: int | None = None


class StandingLighthouse:
    """Each method is an event; ``now`` in seconds on a monotonic clock.

    Args:
        options: the limits.
        quorum_id: ids go on from here: see :func:`torchft.core.election.first_id`.
        now: the time.
        restarted: there was an earlier life: its members are waited for.
        last: the last quorum of that life, where it is known: its members are waited for until they are known to be
            dead or their leases have run out.
    """

    def __init__(
        self,
        options: Options,
        quorum_id: int = 0,
        now: float = 0.0,
        restarted: bool = False,
        last: Quorum | None = None,
    ) -> None:
        self.membership = Membership(options, quorum_id)
        self._stands = False
        self._over = ""
        self._parked: dict[str, Member] = {}
        self._release_at: float | None = None
        self._change: _Change | None = None
        self._changes = 0
        self._drains: set[str] = set()
        self._members: tuple[str, ...] = ()
        self._adopting = True
        self._announced: dict[str, Announcement] = {}
        self._hold_until: float | None = None
        if last is not None:
            self.membership.remember(last, now)
        if restarted:
            self._hold(now)

    @property
    def options(self) -> Options:
        return self.membership.options

    @property
    def stands(self) -> bool:
        """Whether the newest quorum stands."""
        return self._stands

    # ------------------------------------------------------------- sessions

    def attach(self, replica_id: str, active: bool, now: float, announced: Announcement | None = None) -> Orders:
        """A session with the replica is open.

        Args:
            active: it has asked for a quorum before.
            announced: the quorum that it uses.
        """
        outcomes = [self.membership.attach(replica_id, active, now)]
        if announced is None:
            return self._follow(outcomes, now)
        self._parked.pop(replica_id, None)  # on its former session
        if self._adopting:
            self._announced[replica_id] = announced
            if self._hold_until is None:
                self._hold(now)
            return self._follow(outcomes, now, self._adopt(now, False, outcomes))
        current = self.membership.previous
        if current is not None and announced.quorum_id == current.quorum_id and not self._member(replica_id):
            self.membership.admit(Member(replica_id, step=announced.step, standing=True))
        if current is None or announced.quorum_id != current.quorum_id or not self._member(replica_id) or self._over:
            cause = self._over or "a newer one was formed meanwhile"
            return self._follow(outcomes, now, [(replica_id, Over(announced.quorum_id, cause))])
        tell: list[tuple[str, Message]] = []
        if self._change is not None:
            self._change.acks.pop(replica_id, None)
            tell.append((replica_id, self._say(self._change)))
        return self._follow(outcomes, now, tell)

    def beat(self, replica_id: str, now: float) -> int:
        """A sign of life on a session. Returns :meth:`current` for the answer."""
        self.membership.beat(replica_id, now)
        return self.current(replica_id)

    def current(self, replica_id: str) -> int:
        """The newest quorum's id if the replica is in it, keeps a lease in it, and it is not over; else 0."""
        quorum = self.membership.previous
        if quorum is None or not quorum.fenced or self._over or self._adopting or not self._member(replica_id):
            return 0
        return quorum.quorum_id

    def detach(self, replica_id: str, now: float) -> Orders:
        """The session ended, and nobody knows why."""
        if self._change is not None and self._change.step is None:
            self._change.acks.pop(replica_id, None)  # it has forgotten its promise
        self._parked.pop(replica_id, None)  # it asks again, or goes on
        return self._follow([self.membership.detach(replica_id, now)], now)

    def ack(self, replica_id: str, number: int, step: int, now: float) -> Orders:
        """A member has answered a prepare, or a decision that came too late for it."""
        change = self._change
        if change is None or number != change.number or not self._member(replica_id):
            return Orders()
        self.membership.reached(replica_id, step)
        if change.step is None:
            change.acks[replica_id] = step
        elif step >= change.step:
            if not self._stands:  # the others ask, and are not parked any more
                current = self.membership.previous
                assert current is not None
                return Orders(tell=((replica_id, Over(current.quorum_id, "its members have gone on")),))
            self._begin_change()
            return self._follow([], now, self._prepare())
        return self._follow([], now)

    def drain(self, replica_id: str, now: float) -> Orders:
        """A member wants to go, and waits for the step where that costs nobody anything."""
        if self._member(replica_id):
            self._drains.add(replica_id)
        return self._follow([], now)

    # ------------------------------------------------ as of the membership

    def heartbeat(self, replica_id: str, now: float) -> Orders:
        """See :meth:`Membership.heartbeat`."""
        return self._follow([self.membership.heartbeat(replica_id, now)], now)

    def spare(self, now: float) -> Orders:
        """See :meth:`Membership.spare`."""
        return self._follow([self.membership.spare(now)], now)

    def request(self, member: Member, now: float) -> Orders:
        """A replica asks for a quorum and waits."""
        m, rid = self.membership, member.replica_id
        self._parked.pop(rid, None)
        if m.asked_before(member):  # what was said of its quorum meanwhile is said again, after the answer
            tell = [(rid, self._say(self._change))] if self._change is not None else []
            return self._follow([m.request(member, now)], now, list(tell))
        if self._stands and self._member(rid) and not m.breaks(member):
            return self._park(member, now)
        return self._follow([m.request(member, now)], now)

    def withdraw(self, replica_id: str, now: float) -> Orders:
        """A replica no longer waits."""
        self._parked.pop(replica_id, None)
        return self._follow([self.membership.withdraw(replica_id, now)], now)

    def failed(self, replica_id: str, cause: str, now: float, step: int = 0) -> Orders:
        """A replica is known to be dead. See :meth:`Membership.failed`."""
        self._parked.pop(replica_id, None)
        return self._follow([self.membership.failed(replica_id, cause, now, step)], now)

    def tick(self, now: float) -> Orders:
        """Time has passed."""
        outcomes = [self.membership.tick(now)]
        tell: list[tuple[str, Message]] = []
        if self._hold_until is not None and now >= self._hold_until:
            tell = self._adopt(now, True, outcomes)
        return self._follow(outcomes, now, tell)

    def due(self) -> float | None:
        """When time alone may change something; None: it cannot."""
        times = [t for t in (self.membership.due(), self._hold_until, self._release_at) if t is not None]
        return min(times, default=None)

    def waiting(self) -> tuple[Member, ...]:
        """Those that wait for an answer, sorted by replica id."""
        return tuple(sorted((*self.membership.waiting(), *self._parked.values()), key=lambda m: m.replica_id))

    def somebody_waits(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._parked) or self.membership.somebody_waits()

    # ------------------------------------------------------- planned change

    def _member(self, replica_id: str) -> bool:
        return self.membership.is_member(replica_id)

    def _park(self, member: Member, now: float) -> Orders:
        rid = member.replica_id
        self.membership.beat(rid, now)
        self._parked[rid] = member
        if self._change is None:
            self._begin_change()
            return self._follow([], now, self._prepare())
        if self._change.step is None:
            self._change.acks[rid] = member.step - 1
        elif member.step < self._change.step:
            del self._parked[rid]
            return self._follow([], now, [(rid, self._say(self._change))], [rid])
        return self._follow([], now)

    def _begin_change(self) -> None:
        self._changes += 1
        self._release_at = None
        self._change = _Change(self._changes, {rid: m.step - 1 for rid, m in self._parked.items()})

    def _prepare(self) -> list[tuple[str, Message]]:
        """What is to be said of the change, to those who do not ask already."""
        assert self._change is not None
        return [(rid, self._say(self._change)) for rid in self._members if rid not in self._parked]

    def _say(self, change: _Change) -> Prepare | Decide:
        assert self.membership.previous is not None
        quorum_id = self.membership.previous.quorum_id  # of an adopted one: older than this life's ids
        if change.step is None:
            return Prepare(change.number, quorum_id)
        return Decide(change.number, quorum_id, change.step)

    # ------------------------------------------------------------- adoption

    def _hold(self, now: float) -> None:
        self._hold_until = now + self.options.heartbeat_timeout
        self.membership.hold("this lighthouse has just begun: waiting for the members of an earlier quorum")

    def _adopt(self, now: float, last_call: bool, outcomes: list[Outcome]) -> list[tuple[str, Message]]:
        """Takes on the newest quorum that was announced, if all of its members have, or no more are waited for."""
        previous = self.membership.previous
        known = 0 if previous is None else previous.quorum_id
        newest = max((a.quorum_id for a in self._announced.values()), default=0)
        here = {rid: a for rid, a in sorted(self._announced.items()) if a.quorum_id == newest >= known}
        size = max((a.size for a in here.values()), default=0)
        if not last_call and (not here or len(here) < size):
            return []
        asking = [m for m in self.membership.waiting() if m.replica_id in here]
        cause = "a newer one was formed meanwhile"
        told = {rid: a for rid, a in self._announced.items() if rid not in here}
        if here:
            members = tuple(Member(rid, step=a.step, standing=True) for rid, a in here.items())
            stands = len(here) >= size and all(a.stands for a in here.values())
            stands = stands and all(m.uses == newest and not m.commit_failures and m.standing for m in asking)
            quorum = Quorum(newest, members, fenced=True, stands=stands)
            self._enter(quorum)
            self.membership.adopt(quorum, size, now)
            if stands:
                for member in asking:
                    outcomes.append(self.membership.withdraw(member.replica_id, now))
                    self._parked[member.replica_id] = member
            else:
                told = self._announced
                missing = size - len(here)
                cause = f"{missing} of its {size} members did not come back" if missing else "a member cannot go on"
                self._end(cause)
        self._hold_until, self._announced = None, {}
        self.membership.hold("")
        outcomes.append(self.membership.tick(now))
        return [(rid, Over(a.quorum_id, cause)) for rid, a in told.items()]

    # -------------------------------------------------------- what follows

    def _enter(self, quorum: Quorum) -> None:
        """A quorum is the newest from now on."""
        self._members = quorum.replica_ids
        self._stands, self._over = quorum.stands, ""
        self._change, self._release_at = None, None
        self._drains.clear()
        self._adopting = False

    def _end(self, cause: str) -> None:
        """The newest quorum is over before its time: its members are told, and will ask."""
        self._over = self._over or cause
        self._stands = False
        self.membership.break_quorum()
        self._change, self._release_at = None, None

    def _follow(
        self,
        outcomes: list[Outcome],
        now: float,
        tell: list[tuple[str, Message]] | None = None,
        released: list[str] | None = None,
    ) -> Orders:
        """All that an event entails."""
        done: list[Outcome] = []
        tell, released = tell or [], released or []
        while True:
            for outcome in outcomes:
                self._take(outcome)
            done += outcomes
            outcomes = []
            if self._parked and self._may_ask(now):
                self._stands, self._release_at = False, None
                parked, self._parked = self._parked, {}
                outcomes = [self.membership.request_all(parked.values(), now)]
            elif (
                self._change is not None and self._change.step is None and len(self._change.acks) == len(self._members)
            ):
                step = self._change.step = max(self._change.acks.values()) + (2 if len(self._members) > 1 else 1)
                released += [rid for rid, member in self._parked.items() if member.step < step]
                self._parked = {rid: member for rid, member in self._parked.items() if member.step >= step}
                tell += self._prepare()
            elif self._stands and self._change is None and self._wanted():
                self._begin_change()
                tell += self._prepare()
            else:
                return Orders(tuple(done), tuple(tell), tuple(released))

    def _take(self, outcome: Outcome) -> None:
        if outcome.quorum is not None:
            self._enter(outcome.quorum)
        elif outcome.broken is not None:
            self._end(f"replica {outcome.broken.replica_id}: {outcome.broken.cause}")
        else:
            for death in outcome.dead:
                if self._member(death.replica_id):
                    self._end(f"replica {death.replica_id} is no longer there: {death.cause}")

    def _may_ask(self, now: float) -> bool:
        """Whether those that are parked wait for the next quorum like everybody else."""
        if not self._stands:
            return True
        if self._change is None or self._change.step is None:
            return False
        if self._release_at is None:
            self._release_at = now + self.options.heartbeat_timeout
        return len(self._parked) == len(self._members) or now >= self._release_at

    def _wanted(self) -> bool:
        """Whether somebody wants the quorum to change."""
        return bool(self._parked or self._drains) or self.membership.somebody_new_waits()
