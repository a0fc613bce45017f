"""The lighthouse: who is in the quorum (docs/protocol.md, part 1).

A shell around :class:`torchft.core.membership.Membership`: each call and each tick is an event with the monotonic
time, and what comes back is carried out: members answered, failures announced, reasons logged. It keeps nothing
on disk and imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from torchft.coordination import types
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.coordination.server import GrpcServer
from torchft.core.membership import Membership, Options, Outcome
from torchft.runtime import loop
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
        heartbeat_timeout_ms: a replica silent for longer is no longer healthy.
        failure_tick_ms: how often the failures found are sent to subscribers at the latest.

    Raises:
        RuntimeError: the port is taken.
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
    ) -> None:
        if quorum_tick_ms <= 0 or failure_tick_ms <= 0:
            raise ValueError("quorum_tick_ms and failure_tick_ms must be positive")
        options = Options(min_replicas, join_timeout_ms / 1000, heartbeat_timeout_ms / 1000)
        self._service = _Service(options, min(quorum_tick_ms, failure_tick_ms) / 1000)
        self._server = GrpcServer(
            bind,
            lambda server: pb_grpc.add_LighthouseServiceServicer_to_server(self._service, server),
            "lighthouse",
        )
        host = self._server.bound_host or advertised_host()
        self._address = format_address(host, self._server.port)
        self._ticker = loop.submit(self._service.run())
        logger.info("lighthouse listens on %s, min_replicas=%d", self._address, min_replicas)

    def address(self) -> str:
        """``http://host:port`` for clients."""
        return self._address

    @property
    def port(self) -> int:
        return self._server.port

    def inject_failure(self, replica_id: str) -> None:
        """Declares a replica dead, as if it had been seen to die. Subscribers are told."""
        loop.submit(self._service.fail(replica_id, "failure injected")).result(timeout=10)

    def shutdown(self) -> None:
        """Stops serving; those that wait get an error. Idempotent."""
        self._ticker.cancel()
        self._server.stop()


class _Service(pb_grpc.LighthouseServiceServicer):
    """The handlers. Everything runs on the loop, so nothing needs a lock."""

    def __init__(self, options: Options, tick: float) -> None:
        self._core = Membership(options)
        self._tick = tick
        self._answers: dict[str, asyncio.Future[pb.LighthouseQuorumResponse]] = {}
        self._subscribers: set[asyncio.Queue[pb.FailureNotification]] = set()
        self._status_since = 0.0
        self._status_told = True
        self._announced_id = 0

    async def run(self) -> None:
        """The clock of the machine, until cancelled."""
        while True:
            # Not later than the time that decides: a tick later is a tick in which survivors stand still.
            due = self._core.due()
            await asyncio.sleep(self._tick if due is None else min(self._tick, max(0.001, due - time.monotonic())))
            try:
                self._carry_out(self._core.tick(time.monotonic()))
            except Exception:
                logger.exception("a tick of the lighthouse failed; it goes on")

    async def fail(self, replica_id: str, cause: str) -> None:
        self._carry_out(self._core.failed(replica_id, cause, time.monotonic()))

    # ----------------------------------------------------------------- RPCs

    async def Quorum(
        self,
        request: pb.LighthouseQuorumRequest,
        context: grpc.aio.ServicerContext[pb.LighthouseQuorumRequest, pb.LighthouseQuorumResponse],
    ) -> pb.LighthouseQuorumResponse:
        try:
            types.check_member(request.requester)
        except ValueError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
        member = types.member_from_wire(request.requester)
        replica_id = member.replica_id

        earlier = self._answers.pop(replica_id, None)
        if earlier is not None and not earlier.done():
            earlier.set_exception(RuntimeError(f"replica {replica_id} asked again"))
        answer: asyncio.Future[pb.LighthouseQuorumResponse] = asyncio.get_running_loop().create_future()
        self._answers[replica_id] = answer
        self._carry_out(self._core.request(member, time.monotonic()))
        try:
            return await answer
        except RuntimeError as e:
            await context.abort(grpc.StatusCode.ABORTED, str(e))
            raise  # not reached: abort raises
        finally:
            if self._answers.get(replica_id) is answer:  # cancelled: deadline, or the caller is gone
                del self._answers[replica_id]
                self._carry_out(self._core.withdraw(replica_id, time.monotonic()))

    async def Heartbeat(
        self,
        request: pb.LighthouseHeartbeatRequest,
        context: grpc.aio.ServicerContext[pb.LighthouseHeartbeatRequest, pb.LighthouseHeartbeatResponse],
    ) -> pb.LighthouseHeartbeatResponse:
        if not request.replica_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "replica_id is empty")
        self._carry_out(self._core.heartbeat(request.replica_id, time.monotonic()))
        return pb.LighthouseHeartbeatResponse()

    async def SubscribeFailures(
        self,
        request: pb.SubscribeFailuresRequest,
        context: grpc.aio.ServicerContext[pb.SubscribeFailuresRequest, pb.FailureNotification],
    ) -> AsyncIterator[pb.FailureNotification]:
        notices: asyncio.Queue[pb.FailureNotification] = asyncio.Queue(maxsize=4096)
        self._subscribers.add(notices)
        try:
            # The subscription stands as of now: without this a client learns it only from the first notice.
            await context.send_initial_metadata(())
            while True:
                yield await notices.get()
        finally:
            self._subscribers.discard(notices)

    # ------------------------------------------------------------- effects

    def _carry_out(self, outcome: Outcome) -> None:
        for replica_id, cause in outcome.dead:
            logger.info("replica %s counts as dead: %s", replica_id, cause)
            notice = pb.FailureNotification(replica_id=replica_id, error_message=cause)
            for queue in self._subscribers:
                if queue.full():
                    queue.get_nowait()  # a subscriber that does not read loses the oldest, never our memory
                queue.put_nowait(notice)
        if outcome.quorum is not None:
            response = pb.LighthouseQuorumResponse(quorum=types.quorum_to_wire(outcome.quorum, time.time()))
            for member in outcome.quorum.participants:
                answer = self._answers.pop(member.replica_id, None)
                if answer is not None and not answer.done():
                    answer.set_result(response)
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
