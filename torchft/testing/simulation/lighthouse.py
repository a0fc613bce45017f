"""A lighthouse: the real machine of ``core/standing_lighthouse.py`` behind simulated streams.

Mirrors ``coordination/lighthouse_service.py`` (what is answered and told) and ``coordination/session_server.py`` (who
is connected, who was lost, and whether that was a death). It loses everything when it ends, or no longer leads, but
the record: its epoch, and the members of the last quorum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchft.coordination.types import Notice
from torchft.core.election import first_id
from torchft.core.membership import Death, Member, Options, Outcome, Quorum
from torchft.core.standing import Decide, Message, Orders, Prepare
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.runtime.life import Sign
from torchft.testing.simulation.invariants import Invariants
from torchft.testing.simulation.link import Server
from torchft.testing.simulation.network import SERVER, End, Network, Stream
from torchft.testing.simulation.seat import Alone, Seat
from torchft.testing.simulation.settings import Settings
from torchft.testing.simulation.trace import show_id
from torchft.testing.simulation.world import Process, World

__all__ = ["Lighthouse"]

_LOOKS = (0.0, 0.01, 0.03, 0.1, 0.3)
_PARKED = 8
"""Looks for a leader, before who comes is sent away."""


class _Link:
    """A member's open stream."""

    __slots__ = ("last_sign", "life", "process", "provable", "replica_id", "stream")

    def __init__(self, replica_id: str, process: Process, stream: Stream, now: float) -> None:
        self.replica_id = replica_id
        self.process = process
        self.life = process.life
        self.stream = stream
        self.provable = False
        self.last_sign = now

    def send(self, message: tuple[Any, ...]) -> None:
        self.stream.send(SERVER, message)


class Lighthouse:
    """All lives of one lighthouse.

    Args:
        process: where it runs.
        net: the network.
        settings: its timeouts.
        invariants: told of each quorum.
        make: the core's machine; a test gives another one to see what a rule is worth.
        seat: by which right it answers.
    """

    def __init__(
        self,
        process: Process,
        net: Network,
        settings: Settings,
        invariants: Invariants,
        make: Callable[..., StandingLighthouse] = StandingLighthouse,
        seat: Callable[[Lighthouse], Seat] = Alone,
    ) -> None:
        self.process = process
        self.world: World = process.world
        self.net = net
        self.settings = settings
        self.invariants = invariants
        self._make = make
        self._tick = settings.heartbeat_timeout / 3
        self.seat = seat(self)
        self._preparing = False
        self._fresh = False
        self._given: Quorum | None = None
        self.core: StandingLighthouse

    # -------------------------------------------------------------- lifetime

    def start(self) -> None:
        """The process is started."""
        self.process.begin_life()
        self.world.tell(self.process.name, "starts")
        self.net.back(self.process)
        self._links: dict[str, _Link] = {}
        self._of: dict[Stream, _Link] = {}
        self._asking: dict[str, tuple[_Link, int]] = {}
        self._last_event = self.process.time
        self._schedule()
        self.seat.start()

    def begin(self, epoch: int) -> None:
        """It leads: everything it knows it is told anew by those who come."""
        settings = self.settings
        options = Options(settings.min_replicas, settings.join_timeout, settings.heartbeat_timeout, settings.lease)
        last = self.seat.last if settings.record_members else None
        self.core = self._make(options, first_id(epoch), self.process.time, restarted=epoch > 1, last=last)
        self._preparing = False
        self._fresh = True
        self._given = self.core.membership.previous
        self._last_event = self.process.time
        self.world.tell(self.process.name, "leads, epoch %s", epoch)

    def end(self) -> None:
        """It no longer leads: all are sent away."""
        links, self._links, self._of, self._asking = self._links, {}, {}, {}
        for link in links.values():
            link.send(("redirect", self.seat.leader))
            link.stream.close(SERVER)

    def crash(self) -> None:
        """SIGKILL."""
        self.process.end_life()
        self.net.died(self.process)

    def accept(self, net: Network, client: Process, at_client: End) -> Stream | None:
        """A client connects. None: it cannot be reached."""
        if not self.process.alive or net.apart(client.name, self.process.name):
            return None
        return net.connect(client, self.process, at_client, self)

    # ----------------------------------------------------------------- clock

    def _now(self) -> float:
        now = self.process.time
        away, self._last_event = now - self._last_event, now
        if away > self._tick + self.settings.heartbeat_timeout / 2:
            self.world.tell(self.process.name, "was away for %.2f s: silence in that time is nobody's death", away)
            self._carry_out(self.core.spare(now))
        return now

    def _schedule(self) -> None:
        due = self.core.due() if self.seat.epoch else None
        wait = self._tick if due is None else min(self._tick, max(0.001, due - self.process.time))
        self.process.after(wait, self._ticked)

    def _ticked(self) -> None:
        if self.seat.leads():
            self._carry_out(self.core.tick(self._now()))
        self._schedule()

    # -------------------------------------------------------------- sessions

    def received(self, stream: Stream, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "hello":
            self._arriving(stream, message, 0)
            return
        link = self._of.get(stream)
        if link is None or not self.seat.leads():
            return
        link.last_sign = self.process.time
        core, rid = self.core, link.replica_id
        if kind == "beat":
            current = core.beat(rid, self._now())
            if message[1]:
                link.send(("beaten", message[1], current))
            return
        if kind == "ready":
            self._ask(link, message[1], message[2])
            return
        if kind == "leave":
            self._leave(link, message[1], message[2])
            return
        if kind == "ack":
            self._carry_out(core.ack(rid, message[1], message[2], self._now()))
        elif kind == "drain":
            self._carry_out(core.drain(rid, self._now()))
        elif kind == "withdraw":
            if self._asking.get(rid) == (link, message[1]):
                self._withdraw(rid)
        elif kind == "report":
            self._carry_out(core.failed(message[1], message[2], self._now()))
        core.beat(rid, self._now())

    def _arriving(self, stream: Stream, hello: tuple[Any, ...], looks: int) -> None:
        """A member comes. If the leader is just being sought it waits for a moment."""
        if not stream.open[SERVER]:
            return
        seat = self.seat
        if looks == 0:
            seat.told(hello[4])
        if seat.leads():
            self._opened(stream, hello)
        elif not seat.leader and looks < _PARKED:
            self.process.after(0.05, self._arriving, stream, hello, looks + 1)
        else:
            stream.send(SERVER, ("redirect", seat.leader))
            stream.close(SERVER)

    def _opened(self, stream: Stream, hello: tuple[Any, ...]) -> None:
        replica_id, active, announced = hello[1:4]
        link = _Link(replica_id, stream.client, stream, self.process.time)
        former = self._links.pop(replica_id, None)
        if former is not None:
            del self._of[former.stream]
            former.stream.close(SERVER)
        self._links[replica_id] = link
        self._of[stream] = link
        orders = self.core.attach(replica_id, active, self._now(), announced)
        current = self.core.current(replica_id)
        link.send(("welcome", self.settings.lease, self.settings.heartbeat_timeout, current, self.seat.epoch))
        self._carry_out(orders)
        self.net.look(self.process, link.process, link.life, lambda sign: self._proved(link, sign))

    def _proved(self, link: _Link, sign: Sign) -> None:
        link.provable = sign is Sign.ALIVE

    def _leave(self, link: _Link, reason: str, step: int) -> None:
        self._links.pop(link.replica_id, None)
        del self._of[link.stream]
        self._carry_out(self.core.detach(link.replica_id, self._now()))
        self._carry_out(self.core.failed(link.replica_id, f"it left: {reason}", self._now(), step))
        link.send(("left",))
        link.stream.close(SERVER)

    def ended(self, stream: Stream, cause: str) -> None:
        link = self._of.pop(stream, None)
        if link is None or not self.seat.leads():
            return
        if self._links.get(link.replica_id) is link:
            del self._links[link.replica_id]
        asking = self._asking.get(link.replica_id)
        if asking is not None and asking[0] is link:
            self._withdraw(link.replica_id)
        self._carry_out(self.core.detach(link.replica_id, self._now()))
        self._find_out(link, 0)

    def _find_out(self, link: _Link, looks: int) -> None:
        """Why a member was lost, unless it comes back."""
        left = link.last_sign + self.settings.heartbeat_timeout - self.process.time
        pause = min(_LOOKS[min(looks, len(_LOOKS) - 1)], max(0.0, left))
        self.process.after(pause, self._look, link, looks, left)

    def _look(self, link: _Link, looks: int, left: float) -> None:
        if link.replica_id in self._links:
            return
        if not link.provable:
            self._saw(link, looks, left, Sign.UNKNOWN)
            return
        self.net.look(self.process, link.process, link.life, lambda sign: self._saw(link, looks, left, sign))

    def _saw(self, link: _Link, looks: int, left: float, sign: Sign) -> None:
        if link.replica_id in self._links or not self.seat.leads():
            return
        if sign is Sign.GONE:
            self._carry_out(self.core.failed(link.replica_id, "its process has ended", self._now()))
        elif left <= 0:
            self._carry_out(self.core.tick(self._now()))
        else:
            self._find_out(link, looks + 1)

    def reported(self, replica_id: str) -> None:
        """Somebody says that a replica is dead (``LighthouseClient.report_failure``)."""
        if self.seat.leads():
            self._carry_out(self.core.failed(replica_id, "it was reported", self._now()))

    # --------------------------------------------------------------- quorums

    def _ask(self, link: _Link, request_id: int, member: Member) -> None:
        self._asking[member.replica_id] = link, request_id
        self._carry_out(self.core.request(member, self._now()), asking=member.replica_id)

    def _withdraw(self, replica_id: str) -> None:
        del self._asking[replica_id]
        self._carry_out(self.core.withdraw(replica_id, self._now()))

    def _carry_out(self, orders: Orders, asking: str = "") -> None:
        if self._fresh:
            previous = self.core.membership.previous
            if previous is not None and previous is not self._given:
                self._fresh = False
                if previous.quorum_id >> 32 < self.seat.epoch:
                    self.world.point("adoption" if previous.stands else "adoption in part", self.process.name)
        for outcome in orders.outcomes:
            if outcome.again is not None:
                self.world.point("answered again", self.process.name)
                self._answer(asking, outcome.again, "")
            if outcome.broken is not None:
                self._tell(outcome.broken, lives=True)
            self._follow(outcome)
        for replica_id, message in orders.tell:
            self._say(replica_id, message)
        for replica_id in orders.released:
            self.world.point("released", self.process.name)
            self._answer(replica_id, None, "")

    def _answer(self, replica_id: str, quorum: Quorum | None, error: str) -> None:
        asking = self._asking.pop(replica_id, None)
        if asking is not None:
            asking[0].send(("answer", asking[1], quorum, error))

    def _say(self, replica_id: str, message: Message) -> None:
        self.world.tell(self.process.name, "to %s: %s", replica_id, message)
        if isinstance(message, Prepare):
            if not self._preparing:
                self.world.point("prepare", self.process.name)
            self._preparing = True
        elif isinstance(message, Decide):
            if self._preparing:
                self.world.point("decide", self.process.name)
            self._preparing = False
        link = self._links.get(replica_id)
        if link is not None:
            link.send(("standing", message))

    def _tell(self, death: Death, lives: bool = False) -> None:
        notice = Notice(death.replica_id, death.cause, death.quorum_id, death.step, lives)
        self.world.tell(self.process.name, "tells all: %s", notice)
        for link in self._links.values():
            link.send(("notice", notice, death.since))

    def _follow(self, outcome: Outcome) -> None:
        for death in outcome.dead:
            self._tell(death)
            self._answer(death.replica_id, None, f"it was declared dead: {death.cause}")
        if outcome.quorum is not None:
            self._formed(outcome.quorum)

    def _formed(self, quorum: Quorum) -> None:
        self.invariants.named(quorum, self.process.name)
        self.world.point("quorum", self.process.name)
        last, self.seat.last = self.seat.last, quorum
        if self._preparing:
            self.world.point("change dropped", self.process.name)
            self._preparing = False
        if last is not None and set(last.replica_ids).isdisjoint(quorum.replica_ids):
            self.world.point("takeover", self.process.name)
        if self.world.trace is not None:
            self.world.tell(
                self.process.name,
                "%s%s: %s (%s)",
                "standing quorum " if quorum.stands else "quorum ",
                show_id(quorum.quorum_id),
                " ".join(f"{m.replica_id}@{m.step}" for m in quorum.participants),
                self.core.membership.status,
            )
        for replica_id in quorum.replica_ids:
            self._answer(replica_id, quorum, "")


_: type[Server] = Lighthouse
