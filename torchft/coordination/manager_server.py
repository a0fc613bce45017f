"""The server of a replica group: gathers its ranks, asks the lighthouse once for all, counts the commit vote.

It lives in the process of the group's rank 0. That rank calls :meth:`ManagerServer._quorum` and
:meth:`ManagerServer.should_commit` directly, so a group of one rank makes no network hop to itself; the other
ranks, and healing replicas, come by gRPC.

Rules
    - Decisions are made by :mod:`torchft.core.commit` and :mod:`torchft.core.assignment` under one lock, which is
      never held while anything is waited for.
    - Whatever fails on the way to a quorum is answered to every rank that waits; nobody is left to its deadline.
    - Heartbeats begin with the first quorum request: a group that still loads its data keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from datetime import timedelta
from typing import Any

import grpc

from torchft.coordination import types
from torchft.coordination.channel import connect, reason, translate
from torchft.coordination.lighthouse_client import LIGHTHOUSE_HINT
from torchft.coordination.manager_service import Ask, ManagerService
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.coordination.server import GrpcServer
from torchft.core.assignment import assign
from torchft.core.commit import CommitVote, Decision, Gather, Gathered
from torchft.core.membership import Quorum
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.logs import RankLogger
from torchft.runtime.net import advertised_host, format_address, parse_address
from torchft.runtime.retry import retry
from torchft.runtime.worker import Worker

__all__ = ["ManagerServer"]

logger = logging.getLogger(__name__)


class ManagerServer:
    """Serves from construction until ``shutdown``.

    Args:
        replica_id: of the group; unique to this life of it.
        lighthouse_addr: ``http://host:port``.
        hostname: what others are told to connect to; chosen by the route to the lighthouse when empty.
        bind: ``host:port`` to listen on; ``[::]:0`` takes any free port.
        store_addr: ``host:port`` of the group's TCPStore.
        world_size: ranks in the group.
        heartbeat_interval: between signs of life to the lighthouse.
        connect_timeout: how long a lighthouse that is not there yet is waited for.
        quorum_retries: how often a lighthouse call that broke is repeated within its deadline.

    Raises:
        TimeoutError: the lighthouse did not answer within ``connect_timeout``.
        RuntimeError: the port is taken.
    """

    def __init__(
        self,
        replica_id: str,
        lighthouse_addr: str,
        hostname: str,
        bind: str,
        store_addr: str,
        world_size: int,
        heartbeat_interval: timedelta,
        connect_timeout: timedelta,
        quorum_retries: int,
    ) -> None:
        self.replica_id = replica_id
        self._lighthouse_addr = lighthouse_addr
        self._store_addr = store_addr
        self._world_size = world_size
        self._heartbeat_interval = seconds(heartbeat_interval)
        self._quorum_retries = quorum_retries
        self._step = 0
        self._quorum_id: int | None = None
        self._loud = True
        self._log = RankLogger(logger, replica_id, 0, lambda: self._step)

        self._lock = threading.Lock()
        self._gather: Gather[Ask] = Gather(world_size, "quorum")
        self._vote = CommitVote(world_size)
        self._ballots: dict[int, concurrent.futures.Future[Decision]] = {}
        self._checkpoint_metadata: dict[int, str] = {}

        self._log.info("Creating LighthouseClient: establishing connection to %s", lighthouse_addr)
        self._channel = connect(lighthouse_addr, Deadline(connect_timeout), what="lighthouse", hint=LIGHTHOUSE_HINT)
        self._stub = pb_grpc.LighthouseServiceStub(self._channel)
        self._stop = threading.Event()
        self._heartbeats: threading.Thread | None = None
        self._caller = Worker("torchft-lighthouse-call")
        try:
            self._server = GrpcServer(
                bind,
                lambda server: pb_grpc.add_ManagerServiceServicer_to_server(ManagerService(self), server),
                "manager server",
            )
        except BaseException:
            self._caller.shutdown()
            self._channel.close()
            raise
        host = self._server.bound_host or advertised_host(parse_address(lighthouse_addr), hostname)
        self._address = format_address(host, self._server.port)

    def address(self) -> str:
        """``http://host:port`` for the group's other ranks and for healing replicas."""
        return self._address

    def shutdown(self) -> None:
        """Stops serving and stops the heartbeats; those that wait get an error. Idempotent."""
        self._stop.set()
        with self._lock:
            waiting = self._gather.values()
            self._gather.fail("the manager server was shut down")
        for ask in waiting:
            _fail(ask.answer, RuntimeError("the manager server was shut down"))
        self._channel.close()
        self._server.stop()
        self._caller.shutdown()
        if self._heartbeats is not None:
            self._heartbeats.join(timeout=5)

    # ------------------------------------------------------------- quorum

    def _quorum(
        self,
        group_rank: int,
        step: int,
        checkpoint_metadata: str,
        shrink_only: bool,
        timeout: timedelta,
        commit_failures: int,
        init_sync: bool = True,
    ) -> types.QuorumResult:
        """A rank of this process asks for the group's next quorum and waits for it.

        Args and errors: as of :meth:`torchft.coordination.ManagerClient._quorum`.
        """
        request = pb.ManagerQuorumRequest(
            group_rank=group_rank,
            step=step,
            checkpoint_metadata=checkpoint_metadata,
            shrink_only=shrink_only,
            init_sync=init_sync,
            commit_failures=commit_failures,
        )
        ask = Ask(group_rank, request, Deadline(timeout))
        complete = self._come(ask)
        if complete is not None:
            if self._world_size == 1:
                self._ask_lighthouse(complete)  # in this thread: no hop
            else:
                self._caller.submit(lambda: self._ask_lighthouse(complete))
        try:
            quorum = ask.answer.result(timeout=ask.deadline.remaining())
        except concurrent.futures.TimeoutError:
            if ask.answer.done():
                raise
            missing = self._leave(ask, "its deadline passed")
            raise TimeoutError(self._quorum_timeout_message(ask, missing)) from None
        return types.view_to_result(assign(quorum, self.replica_id, group_rank, init_sync))

    def _quorum_timeout_message(self, ask: Ask, missing: tuple[int, ...]) -> str:
        if missing:
            return (
                f"no quorum within {ask.deadline.timeout:g} s: ranks {list(missing)} of this group of "
                f"{self._world_size} did not ask for it. Do they still run?"
            )
        return (
            f"no quorum within {ask.deadline.timeout:g} s: the lighthouse at {self._lighthouse_addr} has not "
            f"answered. Its log says what it waits for; {LIGHTHOUSE_HINT}"
        )

    def _come(self, ask: Ask) -> dict[int, Ask] | None:
        """Adds a rank to the open round. Returns the round when it is complete: somebody must ask then."""
        with self._lock:
            earlier = next((a for a in self._gather.values() if a.rank == ask.rank), None)
            self._step = ask.request.step
            got = self._gather.come(ask.rank, ask)
            self._checkpoint_metadata[ask.rank] = ask.request.checkpoint_metadata
            if got.complete is not None:
                self._vote.reset()
        self._log.log(self._level(), "Start quorum for group_rank %d", ask.rank)
        if got.superseded is not None and earlier is not None:
            _fail(earlier.answer, RuntimeError(f"rank {ask.rank} asked for a quorum again"))
        if got.failed is not None:
            _fail(ask.answer, RuntimeError(f"no quorum for this group: {got.failed}"))
        return got.complete

    def _leave(self, ask: Ask, cause: str) -> tuple[int, ...]:
        """A rank gave up waiting. Returns the ranks that had not come."""
        with self._lock:
            waiting = {a.rank: a for a in self._gather.values()}
            if waiting.get(ask.rank) is not ask:
                return ()
            missing = self._gather.missing
            got: Gathered[Ask] = self._gather.leave(ask.rank, cause)
        for rank in got.answer:
            _fail(waiting[rank].answer, RuntimeError(f"no quorum for this group: {got.failed}"))
        return missing

    def _ask_lighthouse(self, asks: dict[int, Ask]) -> None:
        """Asks once for all ranks and answers each of them, whatever happens."""
        self._log.log(self._level(), "All workers joined - starting quorum")
        try:
            quorum = self._call_lighthouse(list(asks.values()))
        except Exception as e:
            self._loud = True
            for ask in asks.values():
                _fail(ask.answer, e)
            return
        level, self._loud = self._level(), False
        for ask in asks.values():
            self._log.log(level, "Finished quorum for group_rank %d", ask.rank)
            if not ask.answer.done():
                ask.answer.set_result(quorum)

    def _call_lighthouse(self, asks: list[Ask]) -> Quorum:
        self._begin_heartbeats()
        member = pb.QuorumMember(
            replica_id=self.replica_id,
            address=self._address,
            store_address=self._store_addr,
            step=min(a.request.step for a in asks),  # the group is as far as its last rank
            world_size=self._world_size,
            shrink_only=any(a.request.shrink_only for a in asks),
            commit_failures=max(a.request.commit_failures for a in asks),
        )
        deadline = Deadline(max(a.remaining() for a in asks))
        request = pb.LighthouseQuorumRequest(requester=member)

        def attempt() -> pb.LighthouseQuorumResponse:
            # wait_for_ready: a lighthouse that restarts is waited for; only a call that broke is a failure.
            response: pb.LighthouseQuorumResponse = self._stub.Quorum(
                request, timeout=deadline.remaining(), wait_for_ready=True
            )
            return response

        try:
            response = retry(
                attempt,
                deadline=deadline,
                retryable=_worth_another_call,
                attempts=1 + self._quorum_retries,
                on_retry=lambda e, delay: self._log.warning(
                    "quorum at the lighthouse %s failed (%s); next attempt in %.2f s",
                    self._lighthouse_addr,
                    reason(e) if isinstance(e, grpc.RpcError) else e,
                    delay,
                ),
                stop=self._stop,
            )
        except grpc.RpcError as e:
            raise translate(
                e,
                what="lighthouse",
                address=self._lighthouse_addr,
                call="quorum",
                timeout=deadline.timeout,
                hint=LIGHTHOUSE_HINT,
            ) from e
        new = response.quorum.quorum_id != self._quorum_id
        self._quorum_id = response.quorum.quorum_id
        self._loud = self._loud or new
        if new or self._log.isEnabledFor(logging.DEBUG):
            self._log.log(
                logging.INFO if new else logging.DEBUG,
                "got lighthouse quorum %s",
                types.describe(response.quorum),
            )
        return types.core_quorum(response.quorum)

    def _level(self) -> int:
        """The lines of each step are for debugging; those of the first one, and after trouble, tell the story."""
        return logging.INFO if self._loud else logging.DEBUG

    # --------------------------------------------------------- heartbeats

    def _begin_heartbeats(self) -> None:
        if self._heartbeats is None and not self._stop.is_set():
            self._heartbeats = threading.Thread(target=self._beat, name="torchft-heartbeat", daemon=True)
            self._heartbeats.start()

    def _beat(self) -> None:
        request = pb.LighthouseHeartbeatRequest(replica_id=self.replica_id)
        failing = False
        while not self._stop.wait(self._heartbeat_interval):
            try:
                self._stub.Heartbeat(request, timeout=5)
            except (grpc.RpcError, ValueError) as e:  # ValueError: the channel was closed by shutdown
                if self._stop.is_set():
                    return
                if not failing:
                    cause = reason(e) if isinstance(e, grpc.RpcError) else str(e)
                    self._log.warning("heartbeats do not reach the lighthouse %s: %s", self._lighthouse_addr, cause)
                failing = True
            else:
                if failing:
                    self._log.info("heartbeats reach the lighthouse %s again", self._lighthouse_addr)
                failing = False

    # -------------------------------------------------------- commit vote

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        """A rank of this process votes and waits for the decision.

        Args and errors: as of :meth:`torchft.coordination.ManagerClient.should_commit`.
        """
        ballot = self.cast(group_rank, step, should_commit)
        try:
            return bool(ballot.result(timeout=seconds(timeout)).decided)
        except concurrent.futures.TimeoutError:
            if ballot.done():
                raise
            self.uncast(group_rank, ballot, "its deadline passed")
            raise TimeoutError(
                f"the commit vote on step {step} did not end within {seconds(timeout):g} s: a rank of this group "
                f"of {self._world_size} has not voted"
            ) from None

    def cast(self, rank: int, step: int, commit: bool) -> concurrent.futures.Future[Decision]:
        """Casts a vote; the future is the group's decision."""
        ballot: concurrent.futures.Future[Decision] = concurrent.futures.Future()
        with self._lock:
            earlier = self._ballots.get(rank)
            self._ballots[rank] = ballot
            decision = self._vote.vote(rank, step, commit)
            answered = self._take_ballots(decision)
        if decision.superseded is not None and earlier is not None:
            _fail(earlier, RuntimeError(f"rank {rank} voted again"))
        self._answer(answered, decision)
        return ballot

    def uncast(self, rank: int, ballot: concurrent.futures.Future[Decision], cause: str) -> None:
        """The rank that waits on this ballot gave up, or died: the vote fails for the others."""
        with self._lock:
            if self._ballots.get(rank) is not ballot:
                return
            del self._ballots[rank]
            decision = self._vote.leave(rank, cause)
            answered = self._take_ballots(decision)
        self._answer(answered, decision)

    def _take_ballots(self, decision: Decision) -> list[concurrent.futures.Future[Decision]]:
        return [self._ballots.pop(rank) for rank in decision.answer if rank in self._ballots]

    def _answer(self, ballots: list[concurrent.futures.Future[Decision]], decision: Decision) -> None:
        if decision.decided is False and decision.cause:
            self._loud = True
            self._log.log(
                logging.WARNING if self._world_size > 1 else logging.DEBUG,
                "the step is not committed: %s",
                decision.cause,
            )
        for ballot in ballots:
            if not ballot.done():
                ballot.set_result(decision)

    # ------------------------------------------------------------- others

    def checkpoint_metadata(self, rank: int) -> str:
        """Where a healing replica's rank ``rank`` finds this group's state.

        Raises:
            KeyError: that rank has not asked for a quorum yet.
        """
        with self._lock:
            return self._checkpoint_metadata[rank]

    async def wait_quorum(self, ask: Ask) -> Quorum:
        """The gRPC side of :meth:`_quorum`: on the loop, without blocking it."""
        complete = self._come(ask)
        if complete is not None:
            self._caller.submit(lambda: self._ask_lighthouse(complete))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ask.answer), ask.remaining())
        except TimeoutError:
            raise TimeoutError(self._quorum_timeout_message(ask, self._leave(ask, "its deadline passed"))) from None
        except asyncio.CancelledError:
            self._leave(ask, "its call ended (deadline, or the process is gone)")
            raise


def _worth_another_call(error: Exception) -> bool:
    return isinstance(error, grpc.Call) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


def _fail(future: concurrent.futures.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
