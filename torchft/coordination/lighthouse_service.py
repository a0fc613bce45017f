"""What a lighthouse does: the handlers around :class:`torchft.core.standing_lighthouse.StandingLighthouse`.

Each call, each word on a session and each tick is an event with the monotonic time, and what comes back is carried
out: members answered and told, deaths announced, reasons logged. Everything runs on the background loop, so nothing
needs a lock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import grpc
import grpc.aio

from torchft.coordination import types
from torchft.coordination.election import Seat
from torchft.coordination.last_members import LastMembers
from torchft.coordination.lighthouse_askers import Answers, Asker, Call, Question
from torchft.coordination.lighthouse_orders import OrderQueue, Pending, quorum_of
from torchft.coordination.lighthouse_status import StatusLog, status_of
from torchft.coordination.proto import session_pb2, session_pb2_grpc
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.coordination.session_server import Link, SessionService, refuse_elsewhere
from torchft.coordination.standing_wire import ack_from_wire, announcement_from_wire, member_of, message_to_wire
from torchft.core.election import LastQuorum, first_id, plausible
from torchft.core.membership import Death, Member, Options, Outcome
from torchft.core.membership import Quorum as FormedQuorum
from torchft.core.standing import Orders
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.runtime import loop
from torchft.runtime.life import life_address

__all__ = ["Counters", "LighthouseService"]

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What a lighthouse has done since it began."""

    quorum_requests: int = 0
    """Questions for a quorum, by whatever way. In standing steps there are none."""
    quorums: int = 0
    """Quorums formed."""
    beats: int = 0
    """Signs of life on sessions."""


class LighthouseService(pb_grpc.LighthouseServiceServicer):
    """The handlers. Everything runs on the loop, so nothing needs a lock."""

    seat: Seat

    def __init__(self, options: Options, tick: float, forget: int | None = None) -> None:
        self._forget = forget
        self._core = StandingLighthouse(options, now=time.monotonic())
        self.counters = Counters()
        self._tick = tick
        self._orders = OrderQueue(self._do, self._write)
        self._find_dead: concurrent.futures.Future[None] | None = None
        self._answers: dict[str, Asker] = {}
        self._subscribers: set[asyncio.Queue[pb.FailureNotification | None]] = set()
        self._log = StatusLog()
        self._last_event = time.monotonic()
        self._life_address = life_address()
        self.sessions = SessionService(self, options.heartbeat_timeout)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds both services to the server."""
        pb_grpc.add_LighthouseServiceServicer_to_server(self, server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(self.sessions, server)

    # ------------------------------------------------------------ the seat

    def begin(self, epoch: int, last: LastQuorum | None) -> None:
        """It leads: all but what it is given here it is told anew by those who come."""
        self._core = StandingLighthouse(
            self._core.options,
            first_id(epoch),
            time.monotonic(),
            restarted=epoch > 1,
            last=None if last is None else quorum_of(last),
        )
        self._orders.begin(last, self.seat.durable)
        if self._forget is not None and (last is None or last.quorum_id != self._forget):
            known = "none is known" if last is None else f"that was {last.quorum_id}"
            logger.info("quorum %d is not the last one, %s: nothing is forgotten", self._forget, known)
        if last is not None:
            self._look_for(last, self._core)

    def _look_for(self, last: LastQuorum, core: StandingLighthouse) -> None:
        search = LastMembers(
            last,
            patience=core.options.lease + core.options.heartbeat_timeout,
            forget=last.quorum_id == self._forget,
            missing=lambda replica_id: core is self._core and self.sessions.link(replica_id) is None,
            gone=lambda replica_id, cause: self._carry_out(core.failed(replica_id, cause, self._now())),
        )
        search.announce()
        self._find_dead = loop.submit(search.run())

    def end(self, leader: str) -> None:
        """It no longer leads: nobody waits here in vain."""
        self._core = StandingLighthouse(self._core.options, now=time.monotonic())
        self._orders.begin(None, False)
        if self._find_dead is not None:
            self._find_dead.cancel()
        askers, self._answers = self._answers, {}
        for asker in askers.values():
            asker.moved()
        for queue in self._subscribers:
            _put(queue, None)
        self.sessions.redirect(leader)

    def elsewhere(self) -> str | None:
        return None if self.seat.leads() else self.seat.leader

    async def arriving(self, hello: session_pb2.Hello) -> None:
        await self._told(hello.epoch)
        await self.seat.settled(hello.unreached)

    async def _told(self, epoch: int) -> None:
        if not plausible(epoch, self.seat.highest):
            raise ValueError(f"epoch {epoch} is far beyond what is known here, {self.seat.highest}")
        if epoch > self.seat.epoch:
            await self.seat.told(epoch)

    async def told_status(self) -> str:
        return self.status()

    async def healthy(self) -> tuple[str, ...]:
        return self._core.membership.healthy()

    # ------------------------------------------------------------ the clock

    def _now(self) -> float:
        """The time of an event. Ticks make events frequent: a long pause means that this process was stopped or
        starved, and then nobody's silence meanwhile means anything.
        """
        now = time.monotonic()
        away, self._last_event = now - self._last_event, now
        if away > self._tick + self._core.options.heartbeat_timeout / 2:
            logger.warning("the lighthouse was away for %.1f s: silence in that time is nobody's death", away)
            self._carry_out(self._core.spare(now))
        return now

    async def run(self) -> None:
        """The clock of the machine, until cancelled."""
        while True:
            # Not later than the time that decides: a tick later is a tick in which survivors stand still.
            due = self._core.due()
            await asyncio.sleep(self._tick if due is None else min(self._tick, max(0.001, due - time.monotonic())))
            try:
                self._carry_out(self._core.tick(self._now()))
            except Exception:
                logger.exception("a tick of the lighthouse failed; it goes on")

    async def fail(self, replica_id: str, cause: str) -> None:
        self._carry_out(self._core.failed(replica_id, cause, self._now()))

    # ----------------------------------------------------------------- RPCs

    async def Quorum(
        self,
        request: pb.LighthouseQuorumRequest,
        context: grpc.aio.ServicerContext[pb.LighthouseQuorumRequest, pb.LighthouseQuorumResponse],
    ) -> pb.LighthouseQuorumResponse:
        try:
            types.check_member(request.requester)
            await self._told(request.epoch)
        except ValueError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except RuntimeError as e:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(e))
        await refuse_elsewhere(self.elsewhere(), context)
        member = types.member_from_wire(request.requester)
        replica_id = member.replica_id

        asker = Call()
        self._ask(member, asker)
        try:
            return pb.LighthouseQuorumResponse(quorum=await asker.answer, epoch=self.seat.epoch)
        except RuntimeError as e:
            await refuse_elsewhere(self.elsewhere(), context)
            await context.abort(grpc.StatusCode.ABORTED, str(e))
            raise  # not reached: abort raises
        finally:
            self._withdraw(replica_id, asker)  # cancelled: deadline, or the caller is gone

    def _ask(self, member: Member, asker: Asker) -> None:
        if not self.seat.leads():
            asker.moved()
            return
        if (other := self._core.membership.misfits.refuse(member)) is not None:
            asker.fail(_misfit(member, other))
            return
        earlier = self._answers.pop(member.replica_id, None)
        if earlier is not None:
            earlier.fail(f"replica {member.replica_id} asked again")
        self._answers[member.replica_id] = asker
        self.counters.quorum_requests += 1
        self._carry_out(self._core.request(member, self._now()), member.replica_id)
        if self._log.told and self._answers.get(member.replica_id) is asker:
            asker.not_yet(self.status())  # it comes to those who have been told already

    def _tell(self, death: Death, lives: bool = False) -> None:
        notice = types.Notice(death.replica_id, death.cause, death.quorum_id, death.step, lives, death.since)
        self.sessions.broadcast(notice.to_wire())

    def _withdraw(self, replica_id: str, asker: Asker | None) -> None:
        """Nothing happens if it was answered, or another one asks for this replica by now."""
        if asker is not None and self._answers.get(replica_id) is asker:
            del self._answers[replica_id]
            self._carry_out(self._core.withdraw(replica_id, self._now()))

    async def Heartbeat(
        self,
        request: pb.LighthouseHeartbeatRequest,
        context: grpc.aio.ServicerContext[pb.LighthouseHeartbeatRequest, pb.LighthouseHeartbeatResponse],
    ) -> pb.LighthouseHeartbeatResponse:
        if not request.replica_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "replica_id is empty")
        await refuse_elsewhere(self.elsewhere(), context)
        self._carry_out(self._core.heartbeat(request.replica_id, self._now()))
        return pb.LighthouseHeartbeatResponse()

    async def SubscribeFailures(
        self,
        request: pb.SubscribeFailuresRequest,
        context: grpc.aio.ServicerContext[pb.SubscribeFailuresRequest, pb.FailureNotification],
    ) -> AsyncIterator[pb.FailureNotification]:
        await refuse_elsewhere(self.elsewhere(), context)
        notices: asyncio.Queue[pb.FailureNotification | None] = asyncio.Queue(maxsize=4096)
        self._subscribers.add(notices)
        try:
            # The subscription stands as of now: without this a client learns it only from the first notice.
            await context.send_initial_metadata(())
            while (told := await notices.get()) is not None:
                yield told
            await refuse_elsewhere(self.elsewhere() or "", context)
        finally:
            self._subscribers.discard(notices)

    # ------------------------------------------------------------ sessions

    def opened(self, link: Link, hello: session_pb2.Hello) -> session_pb2.Welcome:
        orders = self._core.attach(link.replica_id, hello.active, self._now(), announcement_from_wire(hello))
        self._carry_out(orders)
        options = self._core.options
        return session_pb2.Welcome(
            life_address=self._life_address,
            heartbeat_timeout_ms=round(1000 * options.heartbeat_timeout),
            join_timeout_ms=round(1000 * options.join_timeout),
            lease_ms=round(1000 * options.lease),
            quorum_id=self._core.current(link.replica_id),
            epoch=self.seat.epoch,
        )

    def beat(self, link: Link, number: int) -> None:
        self.counters.beats += 1
        quorum_id = self._core.beat(link.replica_id, self._now())
        if number and self.seat.leads():
            link.send(session_pb2.SessionDown(heard=session_pb2.Heard(number=number, quorum_id=quorum_id)))

    def acked(self, link: Link, message: session_pb2.Ack) -> None:
        ack = ack_from_wire(message)
        if ack is not None and self.sessions.link(link.replica_id) is link:
            self._carry_out(self._core.ack(link.replica_id, ack.change, ack.step, self._now()))

    def drains(self, link: Link) -> None:
        self._carry_out(self._core.drain(link.replica_id, self._now()))

    def left(self, link: Link, reason: str, step: int) -> None:
        self._carry_out(self._core.detach(link.replica_id, self._now()))
        self._carry_out(self._core.failed(link.replica_id, f"it left: {reason}", self._now(), step))

    def ready(self, link: Link, message: session_pb2.Ready) -> None:
        try:
            member = member_of(message, link.replica_id, link.standing)
        except ValueError as e:
            Question(link, message.request_id).fail(str(e))
            return
        self._ask(member, Question(link, message.request_id, member, message.init_sync))

    def withdrawn(self, link: Link, request_id: int) -> None:
        asker = self._answers.get(link.replica_id)
        if isinstance(asker, Question) and (asker.link, asker.request_id) == (link, request_id):
            self._withdraw(link.replica_id, asker)

    def lost(self, link: Link) -> None:
        asker = self._answers.get(link.replica_id)
        if isinstance(asker, Question) and asker.link is link:
            self._withdraw(link.replica_id, asker)
        self._carry_out(self._core.detach(link.replica_id, self._now()))

    def gone(self, link: Link, cause: str) -> None:
        self._carry_out(self._core.failed(link.replica_id, cause, self._now()))

    def silent(self, link: Link, cause: str) -> None:
        self._carry_out(self._core.tick(self._now()))  # the core counts the silence itself

    def reported(self, replica_id: str, cause: str) -> bool:
        known = replica_id in self._core.membership.healthy()
        self._carry_out(self._core.failed(replica_id, cause, self._now()))
        return known

    # ------------------------------------------------------------- effects

    def _carry_out(self, orders: Orders, asked: str = "") -> None:
        """Does what is to be done.

        Args:
            orders: what the core wants.
            asked: the replica whose request this answers.
        """
        previous = self._core.membership.previous
        self._orders.add(Pending(orders, asked, 0 if previous is None else previous.quorum_id))

    def _do(self, pending: Pending) -> None:
        if not self.seat.leads():
            return  # it was stopped, say, and its lease ran out: what it thinks is no longer true
        for outcome in pending.orders.outcomes:
            self._carry_out_one(outcome, pending.asked)
        for replica_id, message in pending.orders.tell:
            link = self.sessions.link(replica_id)
            if link is not None:
                link.send(message_to_wire(message))
        for replica_id in pending.orders.released:
            asker = self._answers.pop(replica_id, None)
            if asker is not None:
                asker.go_on(pending.quorum_id)

    async def _write(self, fenced: FormedQuorum | None) -> LastQuorum | None:
        """Writes down who may train without being heard of from now on."""
        last = None
        if fenced is not None:
            links = [link for rid in fenced.replica_ids if (link := self.sessions.link(rid)) is not None]
            proofs = [link.proof for link in links if link.proof is not None]
            if proofs:
                await asyncio.wait(proofs)  # each is a look of a second at the most
            lives = {link.replica_id: link.life_address for link in links if link.provable}
            last = LastQuorum(fenced.quorum_id, tuple((rid, lives.get(rid, "")) for rid in fenced.replica_ids))
        await self.seat.remember(last)
        return last

    def _carry_out_one(self, outcome: Outcome, asked: str) -> None:
        if outcome.again is not None:
            logger.info("replica %s asks again: the answer was lost on the way", asked)
            self._answer([asked], Answers(outcome.again))
        if outcome.broken is not None:
            self._tell(outcome.broken, lives=True)
        for death in outcome.dead:
            logger.info("replica %s is no longer there: %s", death.replica_id, death.cause)
            self._tell(death)
            waiting = self._answers.pop(death.replica_id, None)
            if waiting is not None:  # it lives after all, or its connection does
                waiting.fail(f"replica {death.replica_id} was declared dead: {death.cause}")
            notice = pb.FailureNotification(replica_id=death.replica_id, error_message=death.cause)
            for queue in self._subscribers:
                _put(queue, notice)
        if outcome.quorum is not None:
            self.counters.quorums += 1
            self._answer(outcome.quorum.replica_ids, Answers(outcome.quorum))
            self._log.formed(outcome.quorum, self._core.membership.status)
        if self._log.due(outcome, self._core.somebody_waits):
            why = self.status()
            logger.info("no quorum yet: %s", why)
            for asker in self._answers.values():
                asker.not_yet(why)

    def _answer(self, replica_ids: Iterable[str], answers: Answers) -> None:
        for replica_id in replica_ids:
            asker = self._answers.pop(replica_id, None)
            if asker is not None:
                asker.succeed(answers)

    def status(self) -> str:
        """Why there is, or is not yet, a quorum; for how long, and what to do, where that is known."""
        return status_of(self._core.membership, self.seat.durable)


def _misfit(member: Member, other: Member) -> str:
    refusal = (
        f"the group {member.replica_id} has {member.world_size} rank(s), and {other.replica_id}, which is there "
        f"already, has {other.world_size}: all groups of a job have the same number. Start this one with that many "
        f"(torchrun --nproc-per-node), or all of them anew. Does its TORCHFT_LIGHTHOUSE name that of its job?"
    )
    logger.warning("refused: %s", refusal)
    return refusal


def _put(queue: asyncio.Queue[pb.FailureNotification | None], notice: pb.FailureNotification | None) -> None:
    if queue.full():
        queue.get_nowait()  # a subscriber that does not read loses the oldest, never our memory
    queue.put_nowait(notice)
