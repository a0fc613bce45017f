"""A client of a group's ManagerServer: for the group's other ranks, and for replicas that heal from it."""

from __future__ import annotations

from datetime import timedelta

import grpc

from torchft.coordination import types
from torchft.coordination.channel import connect, open_channel, translate
from torchft.coordination.group_vote import Voted
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.runtime.deadline import Deadline, seconds

__all__ = ["ManagerClient"]

_HINT = "It lives in the process of the group's rank 0: does that still run, and is its host reachable from here?"


class ManagerClient:
    """Connected from construction on.

    Args:
        addr: ``http://host:port`` of the ManagerServer.
        connect_timeout: how long a server that is not there yet is waited for.
        wait: False for a server that was there a moment ago: nothing is waited for, and a call on one that is gone
            fails at once.
        pings: as of :func:`torchft.coordination.channel.open_channel`: calls at a server that is stopped or cut off
            fail then, long before their timeout.

    Raises:
        TimeoutError: it did not answer within ``connect_timeout``.
        ValueError: ``addr`` is not an address.
    """

    def __init__(
        self, addr: str, connect_timeout: timedelta, *, wait: bool = True, pings: tuple[float, float] | None = None
    ) -> None:
        self._addr = addr
        if wait:
            deadline = Deadline(connect_timeout)
            self._channel = connect(addr, deadline, what="manager server", hint=_HINT, pings=pings)
        else:
            self._channel = open_channel(addr, pings)
        self._stub = pb_grpc.ManagerServiceStub(self._channel)

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
        """Asks for the group's next quorum, with all ranks of the group, and waits for it.

        Args:
            group_rank: of the asking process.
            step: the newest step it has committed; below 0: it holds no usable state.
            checkpoint_metadata: what a healing replica's transport needs to find this rank's state.
            shrink_only: take nobody new in.
            timeout: how long to wait.
            commit_failures: steps in a row that did not commit.
            init_sync: at step 0 all groups take the primary's state.
            timed_out: in its last step it waited for the other groups in vain: those that do not ask soon, hang.
            lineage: the quorum in which its newest step was committed, by it or by whom it healed from; 0: not known.
            waits: if it needs a state, it does not take one in this step.

        Raises:
            TimeoutError: no quorum in time.
            RuntimeError: any other failure, the lighthouse's included; the message names address and cause.
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
        try:
            response = self._stub.Quorum(request, timeout=seconds(timeout))
        except grpc.RpcError as e:
            raise self._translate(e, "quorum", timeout) from e
        return types.result_from_wire(response)

    def _checkpoint_metadata(self, rank: int, timeout: timedelta) -> str:
        """What rank ``rank`` of the group announced as ``checkpoint_metadata``.

        Raises:
            TimeoutError: no answer in time.
            RuntimeError: any other failure.
        """
        try:
            response = self._stub.CheckpointMetadata(pb.CheckpointMetadataRequest(rank=rank), timeout=seconds(timeout))
        except grpc.RpcError as e:
            raise self._translate(e, "checkpoint_metadata", timeout) from e
        metadata: str = response.checkpoint_metadata
        return metadata

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        """Votes on ``step`` and waits for the group's decision: true only if every rank voted true.

        Raises:
            TimeoutError: not all ranks voted in time.
            RuntimeError: any other failure.
        """
        return self.vote(group_rank, step, should_commit, timeout).commit

    def vote(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> Voted:
        """As :meth:`should_commit`; the answer also says whether the next step stands."""
        request = pb.ShouldCommitRequest(should_commit=should_commit, group_rank=group_rank, step=step)
        try:
            response = self._stub.ShouldCommit(request, timeout=seconds(timeout))
        except grpc.RpcError as e:
            raise self._translate(e, "should_commit", timeout) from e
        return Voted(response.should_commit, response.next_stands)

    @property
    def channel(self) -> grpc.Channel:
        """The connection, for further services of the same server."""
        return self._channel

    def close(self) -> None:
        """Closes the connection; calls under way fail."""
        self._channel.close()

    def _translate(self, error: grpc.RpcError, call: str, timeout: timedelta) -> Exception:
        return translate(
            error, what="manager server", address=self._addr, call=call, timeout=seconds(timeout), hint=_HINT
        )
