"""The lighthouse: who is in the quorum, and who has died (docs/protocol.md).

A shell around :class:`torchft.core.membership.Membership`: each call, each word on a session and each tick is an
event with the monotonic time, and what comes back is carried out: members answered, deaths announced, reasons
logged. On disk it keeps an epoch at most (:mod:`torchft.coordination.record`). It imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Protocol

import grpc
import grpc.aio

from torchft.coordination import types
from torchft.coordination.election import Alone, Seat, Shared
from torchft.coordination.etcd import EtcdRegister
from torchft.coordination.proto import session_pb2, session_pb2_grpc
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.coordination.record import StateFile
from torchft.coordination.server import GrpcServer
from torchft.coordination.session_server import Link, SessionService, refuse_elsewhere
from torchft.core.election import LeaseOptions, first_id, plausible
from torchft.core.membership import Death, Member, Membership, Options, Outcome
from torchft.runtime import loop
from torchft.runtime.life import life_address
from torchft.runtime.net import advertised_host, format_address

__all__ = ["LighthouseServer"]

logger = logging.getLogger(__name__)

_STILL_WAITING = 1.0
"""Seconds after which a reason for "not yet" is worth a line at INFO."""


class LighthouseServer:
    """A lighthouse in this process, on the background loop. It serves from construction until ``shutdown``.

    Args:
        bind: ``host:port`` to listen on; ``[::]:0`` takes any free port.
        min_replicas: no quorum has fewer members.
        join_timeout_ms: how long a quorum that could form waits for healthy replicas that have not asked yet.
        quorum_tick_ms: how often time-dependent rules are looked at.
        heartbeat_timeout_ms: a replica silent for longer is no longer healthy. One whose process is seen to end is
            not waited for that long.
        failure_tick_ms: how often the failures found are sent to subscribers at the latest.
        state_file: remembers which quorum ids were used, across restarts. None: ids begin at 1 each time.
        ha: ``etcd://host:port[,host:port][/job]``: this is one of several lighthouses of the job, which elect there the
            one that leads. It remembers the ids, too. See docs/high_availability.md.
        ha_lease_ms: how long a leader that is no longer heard of keeps the others from leading.

    Raises:
        RuntimeError: the port is taken, the state file cannot be used, or etcd's client is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        bind: str,
        min_replicas: int,
        join_timeout_ms: int = 100,
        quorum_tick_ms: int = 100,
        heartbeat_timeout_ms: int = 5000,
        failure_tick_ms: int = 1000,
        *,
        state_file: str | os.PathLike[str] | None = None,
        ha: str | None = None,
        ha_lease_ms: int = 5000,
    ) -> None:
        if quorum_tick_ms <= 0 or failure_tick_ms <= 0:
            raise ValueError("quorum_tick_ms and failure_tick_ms must be positive")
        options = Options(min_replicas, join_timeout_ms / 1000, heartbeat_timeout_ms / 1000)
        if ha is not None and state_file is not None:
            raise ValueError("with ha= etcd remembers the epochs: leave state_file= away")
        self._service = _Service(options, min(quorum_tick_ms, failure_tick_ms) / 1000)
        self._seat = self._sit(state_file, ha, LeaseOptions(ha_lease_ms / 1000))
        try:
            self._server = GrpcServer(bind, self._service.register, "lighthouse", options.heartbeat_timeout)
        except BaseException:
            self._seat.close()
            raise
        host = self._server.bound_host or advertised_host()
        self._address = format_address(host, self._server.port)
        self._ticker = loop.submit(self._service.run())
        logger.info("lighthouse listens on %s, min_replicas=%d", self._address, min_replicas)
        if isinstance(self._seat, Shared):
            self._seat.start(self._address)

    def _sit(self, state_file: str | os.PathLike[str] | None, ha: str | None, lease: LeaseOptions) -> Alone | Shared:
        if ha is not None:
            self._service.seat = Shared(EtcdRegister(ha, lease), lease, self._service)
            return self._service.seat
        record = None if state_file is None else StateFile(state_file)
        try:
            self._service.seat = Alone(record, self._service)
            return self._service.seat
        except BaseException:
            if record is not None:
                record.close()
            raise

    def address(self) -> str:
        """``http://host:port`` for clients."""
        return self._address

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def epoch(self) -> int:
        """Of its reign; 0: it has none, or keeps no record."""
        return self._seat.epoch

    def inject_failure(self, replica_id: str) -> None:
        """Declares a replica dead, as if it had been seen to die. Subscribers are told."""
        loop.submit(self._service.fail(replica_id, "failure injected")).result(timeout=10)

    def replicas(self) -> tuple[str, ...]:
        """Ids of the groups that count as alive, sorted."""
        return loop.submit(self._service.healthy()).result(timeout=10)

    def shutdown(self) -> None:
        """Stops serving; those that wait get an error. Idempotent."""
        self._ticker.cancel()
        loop.get_loop().call_soon_threadsafe(self._service.sessions.close)
        self._server.stop()
        self._seat.close()


class _Asker(Protocol):
    """Somebody who waits for a quorum."""

    def succeed(self, quorum: pb.Quorum) -> None: ...

    def fail(self, cause: str) -> None: ...

    def moved(self) -> None:
        """Another lighthouse has to be asked."""


class _Call:
    """By a call of its own."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[pb.Quorum] = asyncio.get_running_loop().create_future()

    def succeed(self, quorum: pb.Quorum) -> None:
        if not self.answer.done():
            self.answer.set_result(quorum)

    def fail(self, cause: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(RuntimeError(cause))

    def moved(self) -> None:
        self.fail("this lighthouse no longer leads")


class _Question:
    """On a session: half the processor time of a call."""

    def __init__(self, link: Link, request_id: int) -> None:
        self.link = link
        self.request_id = request_id

    def succeed(self, quorum: pb.Quorum) -> None:
        self.link.send(session_pb2.SessionDown(answer=session_pb2.Answer(request_id=self.request_id, quorum=quorum)))

    def fail(self, cause: str) -> None:
        self.link.send(session_pb2.SessionDown(answer=session_pb2.Answer(request_id=self.request_id, error=cause)))

    def moved(self) -> None:
        """The end of the session says it."""


class _Service(pb_grpc.LighthouseServiceServicer):
    """The handlers. Everything runs on the loop, so nothing needs a lock."""

    seat: Seat

    def __init__(self, options: Options, tick: float) -> None:
        self._core = Membership(options)
        self._tick = tick
        self._answers: dict[str, _Asker] = {}
        self._subscribers: set[asyncio.Queue[pb.FailureNotification | None]] = set()
        self._status_since = 0.0
        self._status_told = True
        self._announced_id = 0
        self._last_event = time.monotonic()
        self._life_address = life_address()
        self.sessions = SessionService(self, options.heartbeat_timeout)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds both services to the server."""
        pb_grpc.add_LighthouseServiceServicer_to_server(self, server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(self.sessions, server)

    # ------------------------------------------------------------ the seat

    def begin(self, epoch: int) -> None:
        """It leads: everything it knows it is told anew by those who come."""
        self._core = Membership(self._core.options, first_id(epoch))

    def end(self, leader: str) -> None:
        """It no longer leads: nobody waits here in vain."""
        self._core = Membership(self._core.options)
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

    async def healthy(self) -> tuple[str, ...]:
        return self._core.healthy()

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

        asker = _Call()
        self._ask(member, asker)
        try:
            return pb.LighthouseQuorumResponse(quorum=await asker.answer, epoch=self.seat.epoch)
        except RuntimeError as e:
            await refuse_elsewhere(self.elsewhere(), context)
            await context.abort(grpc.StatusCode.ABORTED, str(e))
            raise  # not reached: abort raises
        finally:
            self._withdraw(replica_id, asker)  # cancelled: deadline, or the caller is gone

    def _ask(self, member: Member, asker: _Asker) -> None:
        if not self.seat.leads():
            asker.moved()
            return
        earlier = self._answers.pop(member.replica_id, None)
        if earlier is not None:
            earlier.fail(f"replica {member.replica_id} asked again")
        self._answers[member.replica_id] = asker
        outcome = self._core.request(member, self._now())
        if outcome.again is not None:
            del self._answers[member.replica_id]
            logger.info("replica %s asks again: the answer was lost on the way", member.replica_id)
            asker.succeed(types.quorum_to_wire(outcome.again, time.time()))
        if outcome.broken is not None:
            self._tell(outcome.broken, lives=True)
        self._carry_out(outcome)

    def _tell(self, death: Death, lives: bool = False) -> None:
        notice = types.Notice(death.replica_id, death.cause, death.quorum_id, death.step, lives)
        self.sessions.broadcast(notice.to_wire())

    def _withdraw(self, replica_id: str, asker: _Asker | None) -> None:
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

    def welcome(self) -> session_pb2.Welcome:
        options = self._core.options
        return session_pb2.Welcome(
            life_address=self._life_address,
            heartbeat_timeout_ms=round(1000 * options.heartbeat_timeout),
            join_timeout_ms=round(1000 * options.join_timeout),
            epoch=self.seat.epoch,
        )

    def opened(self, link: Link, active: bool) -> None:
        self._carry_out(self._core.attach(link.replica_id, active, self._now()))

    def beat(self, link: Link) -> None:
        self._carry_out(self._core.beat(link.replica_id, self._now()))

    def left(self, link: Link, reason: str, step: int) -> None:
        self._carry_out(self._core.detach(link.replica_id, self._now()))
        self._carry_out(self._core.failed(link.replica_id, f"it left: {reason}", self._now(), step))

    def ready(self, link: Link, request_id: int, member: pb.QuorumMember) -> None:
        asker = _Question(link, request_id)
        try:
            types.check_member(member)
            if member.replica_id != link.replica_id:
                raise ValueError(f"this is the session of {link.replica_id}, not of {member.replica_id}")
        except ValueError as e:
            asker.fail(str(e))
            return
        self._ask(types.member_from_wire(member), asker)

    def withdrawn(self, link: Link, request_id: int) -> None:
        asker = self._answers.get(link.replica_id)
        if isinstance(asker, _Question) and (asker.link, asker.request_id) == (link, request_id):
            self._withdraw(link.replica_id, asker)

    def lost(self, link: Link) -> None:
        asker = self._answers.get(link.replica_id)
        if isinstance(asker, _Question) and asker.link is link:
            self._withdraw(link.replica_id, asker)
        self._carry_out(self._core.detach(link.replica_id, self._now()))

    def gone(self, link: Link, cause: str) -> None:
        self._carry_out(self._core.failed(link.replica_id, cause, self._now()))

    def silent(self, link: Link, cause: str) -> None:
        self._carry_out(self._core.tick(self._now()))  # the core counts the silence itself

    def reported(self, replica_id: str, cause: str) -> bool:
        known = replica_id in self._core.healthy()
        self._carry_out(self._core.failed(replica_id, cause, self._now()))
        return known

    # ------------------------------------------------------------- effects

    def _carry_out(self, outcome: Outcome) -> None:
        if not self.seat.leads():
            return  # it was stopped, say, and its lease ran out: what it thinks is no longer true
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
            quorum = types.quorum_to_wire(outcome.quorum, time.time())
            for member in outcome.quorum.participants:
                asker = self._answers.pop(member.replica_id, None)
                if asker is not None:
                    asker.succeed(quorum)
            self._log_quorum(outcome)
        self._log_status(outcome)

    def _log_quorum(self, outcome: Outcome) -> None:
        quorum = outcome.quorum
        assert quorum is not None
        new = quorum.quorum_id != self._announced_id
        self._announced_id = quorum.quorum_id
        logger.log(
            logging.INFO if new else logging.DEBUG,
            "quorum %d of %d replicas at step %d: %s (%s)",
            quorum.quorum_id,
            len(quorum.participants),
            max(m.step for m in quorum.participants),
            ", ".join(quorum.replica_ids[:16]) + (" …" if len(quorum.replica_ids) > 16 else ""),
            self._core.status,
        )

    def _log_status(self, outcome: Outcome) -> None:
        now = time.monotonic()
        if outcome.status is not None:
            logger.debug("%s", outcome.status)
            self._status_since = now
            self._status_told = outcome.quorum is not None or not self._core.waiting()
        elif not self._status_told and now - self._status_since >= _STILL_WAITING:
            self._status_told = True
            logger.info("no quorum yet: %s", self._core.status)


def _put(queue: asyncio.Queue[pb.FailureNotification | None], notice: pb.FailureNotification | None) -> None:
    if queue.full():
        queue.get_nowait()  # a subscriber that does not read loses the oldest, never our memory
    queue.put_nowait(notice)
