"""Who is alive, who waits, and when a quorum forms (docs/protocol.md: *Lighthouse*, *Session*).

The idea
    Replicas show that they live by heartbeats, or by a *session*: a connection that ends when they do. Those that
    want to take the next step *ask* and then wait. The machine answers all that wait with one quorum as soon as
    that is safe and either nobody is missing or the missing have had their time. Who is known to be dead is not
    waited for, and everybody is told.

Rules, checked after each request and each tick, with H = the healthy who wait, sorted by replica id
    1. If any of H asks to shrink only and there was a quorum, the candidates are H ∩ previous quorum, else H.
    2. Fast quorum: all of the previous quorum are in H and the candidates are at least ``min_replicas``: form.
    3. Otherwise form when the candidates are at least ``min_replicas``, H is more than half of the healthy (no
       split brain), and all healthy wait or this has been possible for ``join_timeout`` (decision 5: counted from
       the moment when a quorum became possible, not from when the first of H began to wait).
    4. When a member of the previous quorum has asked, saying that it waited for the others in vain, each of them
       that lives but does not ask within ``heartbeat_timeout`` hangs, and counts as dead.
    5. ``quorum_id`` grows when the set of ids differs from the previous quorum's, a member could not commit, or
       one of the previous quorum has been declared dead since. So a death is a fact about all quorums up to an id.
    6. A quorum of members that all keep sessions is *fenced*: its members may go on with it for their lease without
       being heard of (:mod:`torchft.core.standing`). So one without any of them forms only when each of them is
       known to be dead, or has been silent for ``lease + heartbeat_timeout``; after a quorum of one, for
       ``heartbeat_timeout``.
    7. No quorum of members that hold no state forms while a living replica holds one (:mod:`torchft.core.progress`).
    8. A group with another number of ranks than those that are there is refused (:mod:`torchft.core.misfits`).

Invariants
    - A replica is healthy from its last sign of life until ``heartbeat_timeout`` after it, or until it is known
      to be dead. While its session is open, silence is no death: who holds the session knows better.
    - A session alone makes nobody healthy: a replica counts from its first request on, and one that was declared
      dead from its next request on.
    - A quorum answers exactly its members; who was left out goes on waiting.
    - A request with a number is answered by one quorum, however often it is sent.
    - ``quorum_id`` never goes back, and two quorums with the same id have the same members.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torchft.core.members import Death, Member, Options, Outcome, Quorum
from torchft.core.misfits import Misfits
from torchft.core.progress import JobProgress
from torchft.core.roster import Roster

__all__ = ["Death", "Member", "Membership", "Options", "Outcome", "Quorum"]

_REMEMBERED_DEAD = 4096


class Membership:
    """The state machine of the module's docstring.

    Args:
        options: the limits.
        quorum_id: the id of the last quorum formed by an earlier life, 0 for none; ids go on from there.
    """

    def __init__(self, options: Options, quorum_id: int = 0) -> None:
        self.options = options
        self.quorum_id = quorum_id
        self.previous: Quorum | None = None
        self._roster = Roster()
        self.misfits = Misfits(self._roster)
        """Ask it before a request."""
        self._progress = JobProgress()
        self._dead: dict[str, None] = {}  # in the order of their deaths
        self._broken = False
        self._possible_since: float | None = None
        self._takeover: float | None = None  # when members of the previous quorum are no longer waited for
        self._buried: dict[str, float | None] = {}  # of the previous quorum: the last sign; None: known to be dead
        self._held = ""
        self._since: dict[str, int] = {}
        self._lone = False  # the previous quorum has one member
        self._status = ""

    # ------------------------------------------------------------- events

    def heartbeat(self, replica_id: str, now: float) -> Outcome:
        """A sign of life. It can only ever make others wait, so nothing is decided here."""
        if replica_id not in self.misfits:
            self._roster.sign(replica_id, now)
        return Outcome()

    def attach(self, replica_id: str, active: bool, now: float) -> Outcome:
        """A session with the replica is open.

        Args:
            active: it says that it has asked for a quorum before: it counts, unless it was declared dead since.
        """
        self._roster.open(replica_id)
        counts = active and replica_id not in self._dead and replica_id not in self.misfits
        if counts or replica_id in self._roster.last_sign:
            self._roster.sign(replica_id, now)
        return Outcome()

    def beat(self, replica_id: str, now: float) -> Outcome:
        """A sign of life on a session. Unlike a heartbeat it makes nobody healthy who is not."""
        if replica_id in self._roster.last_sign:
            self._roster.last_sign[replica_id] = now
        return Outcome()

    def detach(self, replica_id: str, now: float) -> Outcome:
        """The session ended, and nobody knows why: from now on silence counts, since the last sign of life."""
        self._roster.close(replica_id)
        return self.tick(now)

    def spare(self, now: float) -> Outcome:
        """The observer itself was away: nobody's silence until now means anything."""
        self._roster.last_sign = dict.fromkeys(self._roster.last_sign, now)
        return Outcome()

    def request(self, member: Member, now: float) -> Outcome:
        """A replica asks for a quorum and waits. A second request of the same replica replaces the first.

        A request that is sent again after it was answered gets the same answer: the first one was lost on the way.
        One of a member that could not finish its step breaks the quorum for all its members: they would wait for
        it in vain.
        """
        if self.asked_before(member):
            self._sign(member.replica_id, now)
            return Outcome(again=self.previous)
        broken = None
        if self.breaks(member):
            what = "it could not finish the step" if member.commit_failures else "it cannot go on with its quorum"
            since = self.member_since(member.replica_id)
            broken = Death(member.replica_id, f"{what} and asks again", self.quorum_id, since=since)
        outcome = self.request_all([member], now)
        return outcome if broken is None else replace(outcome, broken=broken)

    def request_all(self, members: Iterable[Member], now: float) -> Outcome:
        """Several replicas ask in the same moment: what follows is decided when all of them wait."""
        for member in members:
            self._sign(member.replica_id, now)
            self._roster.wait(self._progress.asks(member), now)
        return self.tick(now)

    def breaks(self, member: Member) -> bool:
        """Whether a request says that the previous quorum cannot go on: the others would wait for this member."""
        answered = self._answered(member.replica_id)
        if answered is None or self.previous is None or self.asked_before(member):
            return False
        if self.previous.stands:
            return member.commit_failures > 0 or member.uses != self.previous.quorum_id or not member.standing
        return member.commit_failures > 0 and member.step <= answered.step

    def asked_before(self, member: Member) -> bool:
        """Whether a request was answered by the previous quorum already, and that can still be used."""
        answered = self._answered(member.replica_id)
        return not self._broken and answered is not None and member.attempt != 0 and member.attempt == answered.attempt

    def _sign(self, replica_id: str, now: float) -> None:
        self._roster.sign(replica_id, now)
        self._dead.pop(replica_id, None)
        self._buried.pop(replica_id, None)

    def _answered(self, replica_id: str) -> Member | None:
        """What a replica said when it was taken into the previous quorum."""
        return self._roster.members.get(replica_id)

    def withdraw(self, replica_id: str, now: float) -> Outcome:
        """A replica no longer waits: its call ended or ran into its deadline. It may well be alive."""
        self._roster.unwait(replica_id)
        return self.tick(now)

    def failed(self, replica_id: str, cause: str, now: float, step: int = 0) -> Outcome:
        """A replica is known to be dead: its process ended, it left, it was reported, or an operator says so.

        Args:
            step: where it left in good order: see :attr:`Death.step`.
        """
        self._roster.unwait(replica_id)
        death = (self._bury(replica_id, cause, step),) if replica_id in self._roster.last_sign else ()
        if replica_id in self._roster.members:
            self._buried[replica_id] = None
        outcome = self.tick(now)
        return replace(outcome, dead=(*death, *outcome.dead))

    def adopt(self, quorum: Quorum, size: int, now: float) -> None:
        """A quorum that was formed in an earlier life of the lighthouse is the previous one. Ids go on from it.

        Its members count as alive from now on, as if they had just shown it.

        Args:
            size: members that it has; more than those of ``quorum`` if not all are known.
        """
        self._take(quorum)
        self._lone = size == 1
        self.quorum_id = max(self.quorum_id, quorum.quorum_id)
        for member in quorum.participants:
            self._progress.asks(member)
            self._roster.sign(member.replica_id, now)

    def remember(self, quorum: Quorum, now: float) -> None:
        """That quorum was the last one of an earlier life; nothing is known of its members but their names."""
        self._take(quorum)
        self.quorum_id = max(self.quorum_id, quorum.quorum_id)
        self._buried = dict.fromkeys(quorum.replica_ids, now)
        self._broken = True

    def admit(self, member: Member) -> None:
        """The replica is a member of the adopted quorum as well, but was not known to be."""
        assert self.previous is not None
        members = sorted((*self.previous.participants, member), key=lambda m: m.replica_id)
        self.previous = replace(self.previous, participants=tuple(members))
        self._since[member.replica_id] = self.previous.quorum_id
        self._roster.admit(member)

    @property
    def takeover_at(self) -> float | None:
        """When those that ask need not wait for the silent members of the last quorum any more; None: they do not."""
        return self._takeover

    def somebody_waits(self) -> bool:
        """Whether anybody waits for a quorum."""
        return bool(self._roster.waiters)

    def somebody_new_waits(self) -> bool:
        """Whether a healthy replica that is not in the previous quorum waits for the next one."""
        return self._roster.ready > self._roster.ready_members

    def member_since(self, replica_id: str) -> int:
        """The first of the newest quorums, without a gap, that the replica is in; the next id if it is in none."""
        return self._since.get(replica_id, self.quorum_id + 1)

    def is_member(self, replica_id: str) -> bool:
        """Whether the replica is in the previous quorum."""
        return replica_id in self._since

    def break_quorum(self) -> None:
        """The previous quorum is over, whatever its members say: the next one has another id."""
        self._broken = True

    def reached(self, replica_id: str, step: int) -> None:
        """A replica that goes on without asking says where it is."""
        self._progress.reached(replica_id, step)

    def hold(self, why: str) -> None:
        """No quorum forms until this is called again with an empty reason."""
        self._held = why

    def tick(self, now: float) -> Outcome:
        """Time has passed."""
        dead = self._expire(now) + self._hung(now)
        quorum, status = self._decide(now)
        if status == self._status:
            return Outcome(quorum=quorum, dead=dead)
        self._status = status
        return Outcome(quorum=quorum, dead=dead, status=status)

    # ------------------------------------------------------------ queries

    def healthy(self) -> tuple[str, ...]:
        """Ids of the replicas that count as alive, as of the last event."""
        return tuple(sorted(self._roster.last_sign))

    def waiting(self) -> tuple[Member, ...]:
        """Those that wait for a quorum, sorted by replica id."""
        waiters = self._roster.waiters
        return tuple(waiters[rid][0] for rid in sorted(waiters))

    def due(self) -> float | None:
        """When time alone may change something, if nothing else happens before; None: it cannot."""
        limit = self.options.heartbeat_timeout
        times = [self._roster.last_sign[rid] + limit for rid in self._roster.watched]
        complaint = self._complaint()
        if complaint is not None and self._missing():
            times.append(complaint + limit)
        if self._possible_since is not None:
            times.append(self._possible_since + self.options.join_timeout)
        if self._takeover is not None:
            times.append(self._takeover)
        return min(times, default=None)

    @property
    def status(self) -> str:
        """Why there is, or is not yet, a quorum, in words."""
        return self._status

    # ----------------------------------------------------------- deciding

    def _expire(self, now: float) -> tuple[Death, ...]:
        limit = self.options.heartbeat_timeout
        last_sign = self._roster.last_sign
        silent = [(rid, now - last_sign[rid]) for rid in self._roster.watched if now - last_sign[rid] > limit]
        return tuple(self._bury(rid, f"no heartbeat for {for_s:.1f} s", 0) for rid, for_s in sorted(silent))

    def _complaint(self) -> float | None:
        """When a member of the previous quorum asked because it had waited for the others in vain."""
        complaints = self._roster.complaints.items()
        return min((since for rid, since in complaints if rid in self._roster.members), default=None)

    def _previous_ids(self) -> tuple[str, ...]:
        return () if self.previous is None else self.previous.replica_ids

    def _missing(self) -> list[str]:
        """Those of the previous quorum that live and do not ask."""
        return [r for r in self._previous_ids() if r in self._roster.last_sign and not self._roster.waits(r)]

    def _hung(self, now: float) -> tuple[Death, ...]:
        complaint = self._complaint()
        if complaint is None or now - complaint < self.options.heartbeat_timeout:
            return ()
        cause = f"it lives but hangs: others waited for it in vain, and {now - complaint:.1f} s later it has not asked"
        return tuple(self._bury(rid, cause, 0) for rid in self._missing())

    def _bury(self, replica_id: str, cause: str, step: int) -> Death:
        last_sign = self._roster.drop(replica_id)
        self._progress.ended(replica_id, in_order=step > 0)
        self._dead[replica_id] = None
        if len(self._dead) > _REMEMBERED_DEAD:
            del self._dead[next(iter(self._dead))]
        if replica_id in self._roster.members:
            self._broken = True
            self._buried[replica_id] = last_sign
        return Death(replica_id, cause, self.quorum_id, step, self.member_since(replica_id))

    def _decide(self, now: float) -> tuple[Quorum | None, str]:
        roster, options = self._roster, self.options
        possible_since, self._possible_since = self._possible_since, None
        self._takeover = None
        if self._held:
            return None, self._held
        ready, healthy, members = roster.ready, roster.healthy, len(roster.members)
        if not ready:
            return None, "nobody asks for a quorum"
        shrink = self.previous is not None and any(rid in roster.last_sign for rid in roster.shrinking)
        candidates = roster.ready_members if shrink else ready
        note = " (shrinking: only members of the last quorum)" if shrink else ""

        if candidates < options.min_replicas:
            return None, (f"{candidates} of at least {options.min_replicas} replicas ask for a quorum{note}")
        if members and not roster.ready_members and (waited_for := self._not_over(now)) is not None:
            return None, waited_for + note
        if not roster.holding and self._progress.began:
            chosen = self._chosen(shrink)
            if (missed := self._progress.missed(chosen)) is not None:
                return None, f"those who ask hold no state: waiting for {missed[0]}, which holds step {missed[1]}{note}"
        some, missing = roster.absent()
        if 0 < members == roster.ready_members:
            why = "all members of the last quorum ask again: fast quorum"
        elif 2 * ready <= healthy:
            return None, f"{ready} of {healthy} healthy replicas ask: not more than half{note}"
        elif missing:
            since = now if possible_since is None else possible_since
            if now - since < options.join_timeout:
                self._possible_since = since
                return None, (
                    f"{ready} of {healthy} healthy replicas ask: waiting up to {options.join_timeout:g} s "
                    f"for {', '.join(some)}{' …' if missing > len(some) else ''}{note}"
                )
            why = f"join timeout: going on without {missing} healthy replicas"
        else:
            why = f"all {healthy} healthy replicas ask"
        return self._form(self._chosen(shrink)), why + note

    def _chosen(self, shrink: bool) -> list[Member]:
        """Those that a quorum would have that formed now."""
        return [m for rid, m in self._roster.ready_ones().items() if not shrink or rid in self._roster.members]

    def _take(self, quorum: Quorum) -> None:
        self._since = {rid: self._since.get(rid, quorum.quorum_id) for rid in quorum.replica_ids}
        self.previous = quorum
        self._roster.take(quorum)
        self._lone = len(quorum.participants) == 1
        self._buried = {}

    def _not_over(self, now: float) -> str | None:
        """Why the previous quorum may still go on without any of those that ask; None: it cannot."""
        if self.previous is None or not self.previous.fenced:
            return None
        limit = self.options.heartbeat_timeout
        if not self._lone:
            limit += self.options.lease
        ids = self.previous.replica_ids
        alive = [rid for rid in ids if rid in self._roster.last_sign]
        silent = {rid: at for rid in ids if rid not in alive and (at := self._buried.get(rid)) is not None}
        if alive:
            return f"nobody of the last quorum asks: {_some(alive)} must be asked first"
        over = max((at + limit for at in silent.values()), default=now)
        if now >= over:
            return None
        self._takeover = over
        return (
            f"all of the last quorum are silent, and {_some(sorted(silent))} not known to be dead: they may train on, "
            f"cut off, until {limit:g} s after their last sign. Report them as failed if you know better"
        )

    def _form(self, members: list[Member]) -> Quorum:
        ids = tuple(m.replica_id for m in members)
        roster = self._roster
        changed = self.previous is None or self._broken or ids != self.previous.replica_ids
        self._broken = False
        if changed or any(m.commit_failures > 0 for m in members):
            self.quorum_id += 1
        fenced = all(m.standing and m.replica_id in roster.sessions for m in members)
        same = all((m.step, m.lineage) == (members[0].step, members[0].lineage) for m in members)
        stands = fenced and same and members[0].step >= 0
        quorum = Quorum(self.quorum_id, tuple(members), fenced, stands, self._progress.former(members))
        for rid in ids:
            roster.unwait(rid)
        self._take(quorum)
        return quorum


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (" …" if len(ids) > 5 else "")
