"""A small world of real machines: one lighthouse and some members, wired together by nothing but messages.

Sessions are queues that keep their order. A step of a quorum ends only when all its members are in it, as a
collective does. Faults are what the caller does between: sessions that end, members that fail a step or die, a
lighthouse that begins a new life, time that passes. The world checks what must hold at each commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torchft.core.election import first_id
from torchft.core.membership import Death, Member, Options, Quorum
from torchft.core.standing import Announcement, Message, Orders, Over, Prepare
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.core.standing_member import Grant, MayCommit, StandingMember

__all__ = ["OPTIONS", "Node", "World"]

OPTIONS = Options(min_replicas=1, join_timeout=1.0, heartbeat_timeout=5.0, lease=50.0)


@dataclass
class Node:
    """A group: its machine, and what its shell would keep."""

    name: str
    machine: StandingMember = field(default_factory=StandingMember)
    step: int = 0
    failures: int = 0
    alive: bool = True
    up: bool = False
    """Its session is open."""
    asked: bool = False
    """It has asked for a quorum before."""
    asking: float | None = None
    """When it sent the question that it waits on."""
    attempt: int = 0
    """The number of its question, until that is answered."""
    working: Quorum | None = None
    """In a step of this quorum."""
    commits: int = 0
    bound: bool = False
    """It has answered a prepare on this session: no decision on it may come too late."""
    to_lighthouse: deque[Callable[[], None]] = field(default_factory=deque)
    to_member: deque[Callable[[], None]] = field(default_factory=deque)


class World:
    """See the module's docstring."""

    def __init__(self, names: str) -> None:
        self.now = 0.0
        self.epoch = 0
        self.nodes = {name: Node(name) for name in names}
        self.lighthouse = StandingLighthouse(OPTIONS)
        self.quorums: dict[int, Quorum] = {}
        self.questions = 0
        self.committed: dict[tuple[int, int], set[str]] = {}
        """Who committed a step of a quorum."""

    # -------------------------------------------------------------- faults

    def connect(self, node: Node) -> None:
        """A session begins, if there is none."""
        if node.up or not node.alive:
            return
        node.up = True
        announced, sent_at, active = node.machine.announcement(), self.now, node.asked
        node.to_lighthouse.append(lambda: self._hello(node, active, announced, sent_at))

    def cut(self, node: Node) -> None:
        """Its session ends for both sides; what is under way is lost."""
        if not node.up:
            return
        node.up, node.asking, node.bound = False, None, False
        node.to_lighthouse.clear()
        node.to_member.clear()
        node.machine.lost()
        self.carry_out(self.lighthouse.detach(node.name, self.now))

    def kill(self, node: Node) -> None:
        """It dies, and its kernel says so to the lighthouse and to those it works with."""
        node.alive = False
        self.cut(node)
        self.carry_out(self.lighthouse.failed(node.name, "its process has ended", self.now))
        self._collective_fails(node)

    def fail(self, node: Node) -> None:
        """Something goes wrong in its step."""
        if node.alive and node.working is not None:
            self._give_up(node)

    def restart(self) -> None:
        """The lighthouse ends, and another one begins that knows no more than the last quorum's members."""
        last = self.lighthouse.membership.previous
        self.epoch += 1
        self.lighthouse = StandingLighthouse(OPTIONS, first_id(self.epoch), self.now, True, last)
        for node in self.nodes.values():
            self.cut(node)

    def pass_time(self, seconds: float) -> None:
        """Signs of life are sent, the time passes, the lighthouse's clock ticks."""
        for node in self.nodes.values():
            if node.up:
                number = node.machine.beat(self.now)
                node.to_lighthouse.append(partial(self._beat, node, number))
        self.now += seconds
        self.carry_out(self.lighthouse.tick(self.now))

    # ------------------------------------------------------------ progress

    def deliver(self, node: Node, up: bool) -> None:
        """The oldest message of one direction of its session arrives."""
        queue = node.to_lighthouse if up else node.to_member
        if node.alive and queue:
            queue.popleft()()

    def act(self, node: Node) -> None:
        """It begins its next step, or commits the one it is in if all others are in it."""
        if not node.alive or node.asking is not None:
            return
        if node.working is None:
            self._begin(node)
        elif all(self._is_in(other, node) for other in node.working.replica_ids):
            self._commit(node)
        elif any(self._has_left(other, node.working) for other in node.working.replica_ids):
            self._give_up(node)  # its connections to those that are in another one now are refused

    def _has_left(self, name: str, quorum: Quorum) -> bool:
        newest = self.nodes[name].machine.quorum_id
        return newest is not None and newest > quorum.quorum_id

    def _begin(self, node: Node) -> None:
        machine = node.machine
        if not node.failures and machine.start(node.step, self.now).stands:
            quorum_id = machine.quorum_id
            assert quorum_id is not None
            node.working, node.attempt = self.quorums[quorum_id], 0
            return
        if not node.up:
            return
        if not node.attempt:
            self.questions += 1
            node.attempt = self.questions
        node.asked, node.asking = True, self.now
        member = Member(
            node.name,
            step=node.step,
            commit_failures=node.failures,
            standing=True,
            uses=0 if node.failures else machine.uses(node.step),
            attempt=node.attempt,
        )
        node.to_lighthouse.append(lambda: self.carry_out(self.lighthouse.request(member, self.now)))

    def _is_in(self, name: str, node: Node) -> bool:
        """Whether the step that ``node`` is in has, or had, ``name`` in it too."""
        other, quorum = self.nodes[name], node.working
        assert quorum is not None
        if name in self.committed.get((quorum.quorum_id, node.step), ()):
            return True
        return other.alive and other.working is quorum and other.step == node.step

    def _commit(self, node: Node) -> None:
        quorum = node.working
        assert quorum is not None
        may = node.machine.commit(self.now)
        if may is MayCommit.WAIT:
            return
        if may is MayCommit.NO:
            self._give_up(node)
            return
        # Nothing may commit once a quorum that shares no member with it, directly or by others, has been formed.
        newer = [q for q in self.quorums.values() if q.quorum_id > quorum.quorum_id]
        for q in newer:
            shares = set(q.replica_ids) & set(quorum.replica_ids)
            known_dead = all(not self.nodes[rid].alive for rid in quorum.replica_ids)
            chained = any(set(o.replica_ids) & set(quorum.replica_ids) for o in newer if o.quorum_id <= q.quorum_id)
            assert shares or chained or known_dead, f"{node.name} commits in {quorum.quorum_id} beside {q}"
        self.committed.setdefault((quorum.quorum_id, node.step), set()).add(node.name)
        node.machine.ended(node.step, True)
        node.step, node.failures, node.working = node.step + 1, 0, None
        node.commits += 1

    def _give_up(self, node: Node) -> None:
        node.machine.ended(node.step, False)
        node.failures, node.working = node.failures + 1, None
        self._collective_fails(node)

    def _collective_fails(self, node: Node) -> None:
        """Who waits for it in a step learns it from the connection between them."""
        for other in self.nodes.values():
            together = other.alive and other.working is not None and node.name in other.working.replica_ids
            if together and not self._is_in(node.name, other):
                self._give_up(other)

    # ------------------------------------------------- what messages do

    def _hello(self, node: Node, active: bool, announced: Announcement | None, sent_at: float) -> None:
        orders = self.lighthouse.attach(node.name, active, self.now, announced)
        current = self.lighthouse.current(node.name)
        options = self.lighthouse.options
        node.to_member.append(lambda: node.machine.welcomed(options.lease, options.heartbeat_timeout, current, sent_at))
        self.carry_out(orders)

    def _beat(self, node: Node, number: int) -> None:
        current = self.lighthouse.beat(node.name, self.now)
        if number:
            node.to_member.append(lambda: node.machine.beat_answered(number, current))

    def carry_out(self, orders: Orders) -> None:
        """The lighthouse's shell."""
        for outcome in orders.outcomes:
            for death in (*outcome.dead, *([outcome.broken] if outcome.broken else [])):
                for node in self.nodes.values():
                    self._send(node, partial(self._notice, node, death))
            for quorum in (outcome.quorum, outcome.again):
                if quorum is not None:
                    self._formed(quorum)
        for rid, message in orders.tell:
            self._send(self.nodes[rid], partial(self._hear, self.nodes[rid], message))
        for rid in orders.released:
            assert self.lighthouse.membership.previous is not None
            quorum_id = self.lighthouse.membership.previous.quorum_id
            self._send(self.nodes[rid], partial(self._go_on, self.nodes[rid], quorum_id))

    def _formed(self, quorum: Quorum) -> None:
        known = self.quorums.setdefault(quorum.quorum_id, quorum)
        assert known.replica_ids == quorum.replica_ids, "a quorum id means one membership"
        for rid in quorum.replica_ids:
            self._send(self.nodes[rid], partial(self._answer, self.nodes[rid], quorum, known))

    def _send(self, node: Node, message: Callable[[], None]) -> None:
        if node.up:
            node.to_member.append(message)

    def _answer(self, node: Node, quorum: Quorum, known: Quorum) -> None:
        if node.asking is None:
            return
        ids = quorum.replica_ids
        grant = Grant(quorum.quorum_id, ids.index(node.name), len(ids), quorum.fenced, quorum.stands)
        step = max(m.step for m in quorum.participants)
        node.machine.entered(grant, step, node.asking)
        node.asking, node.attempt, node.working = None, 0, known
        assert step >= node.step, "a committed step is never taken back"
        node.step = step

    def _go_on(self, node: Node, quorum_id: int) -> None:
        if node.asking is not None:
            node.machine.go_on(quorum_id, node.asking)
            node.asking, node.attempt = None, 0

    def _notice(self, node: Node, death: Death) -> None:
        if node.machine.notice(death.since, death.quorum_id, death.cause) and node.working is not None:
            self._give_up(node)

    def _hear(self, node: Node, message: Message) -> None:
        if isinstance(message, Over):
            if node.machine.over(message) and node.working is not None:
                self._give_up(node)
            return
        if isinstance(message, Prepare):
            ack = node.machine.prepare(message)
            node.bound = ack is not None
        else:
            ack = node.machine.decide(message)
            assert ack is None or not node.bound, f"{node.name} has promised not to start {message.step} yet"
        if ack is not None:
            node.to_lighthouse.append(
                lambda: self.carry_out(self.lighthouse.ack(node.name, ack.change, ack.step, self.now))
            )
