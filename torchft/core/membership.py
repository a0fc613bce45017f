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

from dataclasses import dataclass, replace

__all__ = ["Death", "Member", "Membership", "Options", "Outcome", "Quorum"]

_REMEMBERED_DEAD = 4096


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
    world_size: int = 1
    """Ranks in the group."""
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


@dataclass(frozen=True, slots=True)
class Quorum:
    """The members of the next step, sorted by replica id."""

    quorum_id: int
    participants: tuple[Member, ...]

    @property
    def replica_ids(self) -> tuple[str, ...]:
        return tuple(m.replica_id for m in self.participants)


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds."""

    min_replicas: int
    join_timeout: float = 0.1
    heartbeat_timeout: float = 5.0

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas is {self.min_replicas}: a quorum needs at least one replica")
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
        self._last_sign: dict[str, float] = {}
        self._sessions: set[str] = set()
        self._dead: dict[str, None] = {}  # in the order of their deaths
        self._broken = False
        self._waiters: dict[str, tuple[Member, float]] = {}  # and since when
        self._possible_since: float | None = None
        self._status = ""

    # ------------------------------------------------------------- events

    def heartbeat(self, replica_id: str, now: float) -> Outcome:
        """A sign of life. It can only ever make others wait, so nothing is decided here."""
        self._last_sign[replica_id] = now
        return Outcome()

    def attach(self, replica_id: str, active: bool, now: float) -> Outcome:
        """A session with the replica is open.

        Args:
            active: it says that it has asked for a quorum before: it counts, unless it was declared dead since.
        """
        self._sessions.add(replica_id)
        if replica_id in self._last_sign or (active and replica_id not in self._dead):
            self._last_sign[replica_id] = now
        return Outcome()

    def beat(self, replica_id: str, now: float) -> Outcome:
        """A sign of life on a session. Unlike a heartbeat it makes nobody healthy who is not."""
        if replica_id in self._last_sign:
            self._last_sign[replica_id] = now
        return Outcome()

    def detach(self, replica_id: str, now: float) -> Outcome:
        """The session ended, and nobody knows why: from now on silence counts, since the last sign of life."""
        self._sessions.discard(replica_id)
        return self.tick(now)

    def spare(self, now: float) -> Outcome:
        """The observer itself was away: nobody's silence until now means anything."""
        self._last_sign = dict.fromkeys(self._last_sign, now)
        return Outcome()

    def request(self, member: Member, now: float) -> Outcome:
        """A replica asks for a quorum and waits. A second request of the same replica replaces the first.

        A request that is sent again after it was answered gets the same answer: the first one was lost on the way.
        One of a member that could not finish its step breaks the quorum for all its members: they would wait for
        it in vain.
        """
        self._last_sign[member.replica_id] = now
        self._dead.pop(member.replica_id, None)
        answered = self._answered(member.replica_id)
        if answered is not None and member.attempt and member.attempt == answered.attempt:
            return Outcome(again=self.previous)
        broken = None
        if answered is not None and member.commit_failures > 0 and member.step <= answered.step:
            broken = Death(member.replica_id, "it could not finish the step and asks again", self.quorum_id)
        self._waiters[member.replica_id] = member, now
        outcome = self.tick(now)
        return outcome if broken is None else replace(outcome, broken=broken)

    def _answered(self, replica_id: str) -> Member | None:
        """What a replica said when it was taken into the previous quorum."""
        members = () if self.previous is None else self.previous.participants
        return next((m for m in members if m.replica_id == replica_id), None)

    def withdraw(self, replica_id: str, now: float) -> Outcome:
        """A replica no longer waits: its call ended or ran into its deadline. It may well be alive."""
        self._waiters.pop(replica_id, None)
        return self.tick(now)

    def failed(self, replica_id: str, cause: str, now: float, step: int = 0) -> Outcome:
        """A replica is known to be dead: its process ended, it left, it was reported, or an operator says so.

        Args:
            step: where it left in good order: see :attr:`Death.step`.
        """
        self._waiters.pop(replica_id, None)
        death = (self._bury(replica_id, cause, step),) if replica_id in self._last_sign else ()
        outcome = self.tick(now)
        return replace(outcome, dead=(*death, *outcome.dead))

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
        return tuple(sorted(self._last_sign))

    def waiting(self) -> tuple[Member, ...]:
        """Those that wait for a quorum, sorted by replica id."""
        return tuple(self._waiters[rid][0] for rid in sorted(self._waiters))

    def due(self) -> float | None:
        """When time alone may change something, if nothing else happens before; None: it cannot."""
        limit = self.options.heartbeat_timeout
        times = [at + limit for rid, at in self._last_sign.items() if rid not in self._sessions]
        complaint = self._complaint()
        if complaint is not None and self._missing():
            times.append(complaint + limit)
        if self._possible_since is not None:
            times.append(self._possible_since + self.options.join_timeout)
        return min(times, default=None)

    @property
    def status(self) -> str:
        """Why there is, or is not yet, a quorum, in words."""
        return self._status

    # ----------------------------------------------------------- deciding

    def _expire(self, now: float) -> tuple[Death, ...]:
        limit = self.options.heartbeat_timeout
        silent = [
            (rid, now - at) for rid, at in self._last_sign.items() if now - at > limit and rid not in self._sessions
        ]
        return tuple(self._bury(rid, f"no heartbeat for {for_s:.1f} s", 0) for rid, for_s in sorted(silent))

    def _complaint(self) -> float | None:
        """When a member of the previous quorum asked because it had waited for the others in vain."""
        waiting = (self._waiters[r] for r in self._previous_ids() if r in self._waiters)
        return min((since for member, since in waiting if member.timed_out), default=None)

    def _previous_ids(self) -> tuple[str, ...]:
        return () if self.previous is None else self.previous.replica_ids

    def _missing(self) -> list[str]:
        """Those of the previous quorum that live and do not ask."""
        return [r for r in self._previous_ids() if r in self._last_sign and r not in self._waiters]

    def _hung(self, now: float) -> tuple[Death, ...]:
        complaint = self._complaint()
        if complaint is None or now - complaint < self.options.heartbeat_timeout:
            return ()
        cause = f"it lives but hangs: others waited for it in vain, and {now - complaint:.1f} s later it has not asked"
        return tuple(self._bury(rid, cause, 0) for rid in self._missing())

    def _bury(self, replica_id: str, cause: str, step: int) -> Death:
        del self._last_sign[replica_id]
        self._dead[replica_id] = None
        if len(self._dead) > _REMEMBERED_DEAD:
            del self._dead[next(iter(self._dead))]
        if replica_id in self._previous_ids():
            self._broken = True
        return Death(replica_id, cause, self.quorum_id, step)

    def _decide(self, now: float) -> tuple[Quorum | None, str]:
        options = self.options
        ready = {m.replica_id: m for m in self.waiting() if m.replica_id in self._last_sign}
        possible_since, self._possible_since = self._possible_since, None
        if not ready:
            return None, "nobody asks for a quorum"
        previous = set(self._previous_ids())
        shrink = self.previous is not None and any(m.shrink_only for m in ready.values())
        candidates = [m for rid, m in ready.items() if not shrink or rid in previous]
        note = " (shrinking: only members of the last quorum)" if shrink else ""

        if len(candidates) < options.min_replicas:
            return None, (f"{len(candidates)} of at least {options.min_replicas} replicas ask for a quorum{note}")
        if previous and previous.issubset(ready):
            return self._form(candidates), "all members of the last quorum ask again: fast quorum" + note

        healthy = len(self._last_sign)
        if 2 * len(ready) <= healthy:
            return None, f"{len(ready)} of {healthy} healthy replicas ask: not more than half{note}"
        missing = sorted(set(self._last_sign) - set(ready))
        if missing:
            since = now if possible_since is None else possible_since
            if now - since < options.join_timeout:
                self._possible_since = since
                return None, (
                    f"{len(ready)} of {healthy} healthy replicas ask: waiting up to {options.join_timeout:g} s "
                    f"for {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}{note}"
                )
            return self._form(candidates), f"join timeout: going on without {len(missing)} healthy replicas{note}"
        return self._form(candidates), f"all {healthy} healthy replicas ask{note}"

    def _form(self, members: list[Member]) -> Quorum:
        ids = tuple(m.replica_id for m in members)
        changed = self.previous is None or self._broken or ids != self.previous.replica_ids
        self._broken = False
        if changed or any(m.commit_failures > 0 for m in members):
            self.quorum_id += 1
        quorum = Quorum(self.quorum_id, tuple(members))
        self.previous = quorum
        for rid in ids:
            del self._waiters[rid]
        return quorum
