"""The server of a replica group: the quorum round and the commit vote of its ranks, and who of them is gone.

It lives in the process of the group's rank 0. That rank calls :meth:`ManagerServer._quorum` and
:meth:`ManagerServer.should_commit` directly, so a group of one rank makes no network hop to itself; the other
ranks, and healing replicas, come by gRPC.

Rules
    - Steps begin in :mod:`torchft.coordination.quorum_round` and end in :mod:`torchft.coordination.group_vote`; what
      either answers is decided by :mod:`torchft.core`.
    - Who dies is told to all: a rank of this group ends what its other ranks wait for and is reported to the
      lighthouse; what the lighthouse says of other groups is passed on to every rank.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from datetime import timedelta

from torchft.coordination import types
from torchft.coordination.group_vote import Ballot, GroupVote, Voted
from torchft.coordination.lighthouse_link import LighthouseLink
from torchft.coordination.manager_service import register
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.quorum_round import Ask, QuorumRound
from torchft.coordination.rank_sessions import RANK_HEARTBEAT_TIMEOUT, RankSessions
from torchft.coordination.server import GrpcServer
from torchft.coordination.standing_wire import GroupQuorum
from torchft.runtime import loop
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.logs import RankLogger
from torchft.runtime.net import advertised_host, format_address, parse_address, parse_addresses
from torchft.runtime.worker import Worker

__all__ = ["ManagerServer"]

logger = logging.getLogger(__name__)

_DECIDED = 1.0
"""Seconds from a decision until all have been told."""


class ManagerServer:
    """Serves from construction until ``shutdown``.

    Args:
        replica_id: of the group; unique to this life of it.
        lighthouse_addr: ``http://host:port``; where standbys stand by, several with commas between.
        hostname: what others are told to connect to; chosen by the route to the lighthouse when empty.
        bind: ``host:port`` to listen on; ``[::]:0`` takes any free port.
        store_addr: ``host:port`` of the group's TCPStore.
        world_size: ranks in the group.
        heartbeat_interval: between signs of life to the lighthouse.
        connect_timeout: how long a lighthouse that is not there yet is waited for.
        quorum_retries: how often a lighthouse call that broke is repeated within its deadline.
        sessions: see deaths at once, of this group's ranks and through the lighthouse of other groups. With False
            only heartbeats tell who lives.

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
        *,
        sessions: bool = True,
    ) -> None:
        self.replica_id = replica_id
        self._world_size = world_size
        self._step = 0
        self._log = RankLogger(logger, replica_id, 0, lambda: self._step)

        self._listener: Callable[[types.Notice], None] = lambda _: None

        self._lighthouse = LighthouseLink(
            lighthouse_addr,
            replica_id=replica_id,
            world_size=world_size,
            hostname=hostname,
            connect_timeout=connect_timeout,
            heartbeat_interval=heartbeat_interval,
            quorum_retries=quorum_retries,
            sessions=sessions,
            on_notice=self._on_notice,
            log=self._log,
        )
        self._caller = Worker("torchft-lighthouse-call")
        self._group_vote = GroupVote(world_size, self._lighthouse.standing, self._caller, self._log)
        self._quorum_round = QuorumRound(
            replica_id=replica_id,
            store_addr=store_addr,
            world_size=world_size,
            address=self.address,
            lighthouse=self._lighthouse,
            lighthouse_addr=lighthouse_addr,
            worker=self._caller,
            on_come=self._group_vote.gone_on,
            on_complete=self._group_vote.reset,
            log=self._log,
        )
        self._ranks = RankSessions(self, hostname).service
        try:
            self._server = GrpcServer(
                bind, lambda server: register(server, self, self._ranks), "manager server", RANK_HEARTBEAT_TIMEOUT
            )
        except BaseException:
            self._caller.shutdown()
            self._lighthouse.close()
            raise
        host = self._server.bound_host or advertised_host(parse_address(parse_addresses(lighthouse_addr)[0]), hostname)
        self._address = format_address(host, self._server.port)

    def address(self) -> str:
        """``http://host:port`` for the group's other ranks and for healing replicas."""
        return self._address

    def shutdown(self) -> None:
        """Stops serving and stops the heartbeats; those that wait get an error. Idempotent."""
        self._break("the manager server was shut down")
        self._lighthouse.close()
        loop.get_loop().call_soon_threadsafe(self._ranks.close)
        self._server.stop()
        self._caller.shutdown()

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
        timed_out: bool = False,
        lineage: int = 0,
        waits: bool = False,
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
            timed_out=timed_out,
            lineage=lineage,
            waits=waits,
        )
        self._step = step
        quorum = self._quorum_round.wait(Ask(group_rank, request, Deadline(timeout)))
        return types.view_to_result(quorum.view(group_rank, init_sync))

    async def wait_quorum(self, ask: Ask) -> GroupQuorum:
        """The gRPC side of :meth:`_quorum`: on the loop, without blocking it."""
        self._step = ask.request.step
        return await self._quorum_round.wait_on_loop(ask)

    # ----------------------------------------------------- deaths, departures

    def listen(
        self,
        on_notice: Callable[[types.Notice], None],
        on_welcome: Callable[[timedelta, timedelta], None] = lambda heartbeat_timeout, join_timeout: None,
    ) -> None:
        """From now on tells what this group is told, on a thread of the server's.

        Args:
            on_notice: a replica is no longer there.
            on_welcome: the lighthouse's heartbeat and join timeouts, once they are known.
        """
        self._listener = on_notice
        self._lighthouse.tell_timeouts(on_welcome)

    def _on_notice(self, notice: types.Notice) -> None:
        """The lighthouse says that somebody is no longer there: all ranks of the group are told."""
        self._log.log(logging.DEBUG if notice.lives else logging.INFO, "%s", notice)
        self._tell(notice)

    def _tell(self, notice: types.Notice) -> None:
        self._tell_ranks(notice)
        self._listener(notice)

    def _tell_ranks(self, notice: types.Notice) -> None:
        loop.get_loop().call_soon_threadsafe(self._ranks.broadcast, notice.to_wire())

    def leave(self, reason: str, step: int, timeout: timedelta = timedelta(seconds=1)) -> bool:
        """Tells the lighthouse, and through it all groups, that this group goes.

        Args:
            reason: for the others' logs.
            step: all steps below it are committed.
            timeout: for the answer.

        Returns:
            Whether everybody was told. False without a lighthouse that knows sessions.
        """
        self._break(f"this group leaves: {reason}")
        self._tell_ranks(types.Notice(self.replica_id, f"rank 0 of this group left: {reason}", types.ANY_QUORUM, step))
        return self._lighthouse.leave(reason, step, seconds(timeout))

    def rank_is_there(self, rank: int) -> None:
        """A rank opened its session: if it was dead, it is no longer."""
        self._quorum_round.rank_is_there(rank)

    def rank_left(self, rank: int, reason: str, step: int) -> None:
        """A rank goes on purpose, and with it the group. On the loop."""
        # On a thread of its own: the worker may be waiting for the lighthouse, which waits for this group or another.
        said = f"rank {rank}: {reason}", step, 1.0
        threading.Thread(target=self._lighthouse.leave, args=said, name="torchft-leave", daemon=True).start()
        self._rank_ended(rank, f"rank {rank} of this group left: {reason}", step)

    def rank_died(self, rank: int, cause: str) -> None:
        """A rank's process has ended, or is as good as dead. On the loop."""
        self._log.error("rank %d of this group is no longer there: %s", rank, cause)
        self._lighthouse.report(self.replica_id, f"its rank {rank} is no longer there: {cause}")
        self._rank_ended(rank, f"rank {rank} of this group is no longer there: {cause}")

    def _rank_ended(self, rank: int, cause: str, step: int = 0) -> None:
        self._quorum_round.rank_ended(rank, cause)
        self._break(cause)
        self._tell(types.Notice(self.replica_id, cause, types.ANY_QUORUM, step))

    def _break(self, cause: str) -> None:
        """Ends what ranks of this group wait for."""
        self._quorum_round.end(cause)
        self._group_vote.end(cause)

    # -------------------------------------------------------- commit vote

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        """A rank of this process votes and waits for the decision.

        Args and errors: as of :meth:`torchft.coordination.ManagerClient.should_commit`.
        """
        return self.vote(group_rank, step, should_commit, timeout).commit

    def vote(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> Voted:
        """As :meth:`should_commit`; the answer also says whether the next step stands."""
        if self._world_size == 1 and group_rank == 0:
            voted = Voted(self._group_vote.alone(step, should_commit, Deadline(timeout)))
        else:
            voted = self._vote_with_others(group_rank, step, should_commit, timeout)
        if not voted.commit:
            self._quorum_round.speak_up()
        return voted

    def _vote_with_others(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> Voted:
        ballot = self.cast(group_rank, step, should_commit)
        try:
            return ballot.result(timeout=seconds(timeout))
        except concurrent.futures.TimeoutError:
            waited_for = "" if ballot.done() else self.uncast(group_rank, ballot, "its deadline passed")
            if not waited_for:
                return ballot.result(timeout=_DECIDED)  # the others do as was decided
            raise TimeoutError(
                f"the commit vote on step {step} did not end within {seconds(timeout):g} s: {waited_for}"
            ) from None

    def cast(self, rank: int, step: int, commit: bool) -> Ballot:
        """Casts a vote; the future is the group's decision."""
        if (dead := self._quorum_round.dead) is not None:
            ballot: Ballot = concurrent.futures.Future()
            ballot.set_exception(RuntimeError(f"no commit in this group: {dead}"))
            return ballot
        ballot = self._group_vote.cast(rank, step, commit)
        if (dead := self._quorum_round.dead) is not None:  # it died in between: nobody else ends this vote
            self._group_vote.end(dead)
        if (ahead := self._quorum_round.waiting_beside(rank)) is not None:
            self._group_vote.gone_on(ahead)
        return ballot

    def uncast(self, rank: int, ballot: Ballot, cause: str) -> str:
        """As :meth:`GroupVote.uncast`."""
        return self._group_vote.uncast(rank, ballot, cause)

    def stands(self, step: int) -> bool:
        """For a group of one rank: whether ``step`` begins now with the quorum there is, without asking."""
        return self._lighthouse.standing.stands(step)

    def drain(self) -> bool:
        """Asks for a change of the members, at which this group can go. Returns whether it could ask."""
        return self._lighthouse.drain()

    @property
    def lighthouse_calls(self) -> int:
        """Questions for a quorum that went to the lighthouse so far; in standing steps there are none."""
        return self._lighthouse.calls

    # ------------------------------------------------------------- others

    def checkpoint_metadata(self, rank: int) -> str:
        """Where a healing replica's rank ``rank`` finds this group's state.

        Raises:
            KeyError: that rank has not asked for a quorum yet.
        """
        return self._quorum_round.checkpoint_metadata(rank)
