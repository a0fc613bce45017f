"""The gRPC face of a ManagerServer: what the group's other ranks and healing replicas call.

It runs on the background loop and only translates: requests into calls of the server, answers and failures back,
and a call that ended (deadline, or its process is gone) into a rank that left.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from torchft.coordination import types
from torchft.coordination.proto import session_pb2_grpc
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.coordination.quorum_round import Ask
from torchft.coordination.session_server import SessionService
from torchft.core.assignment import AssignmentError
from torchft.runtime.deadline import Deadline

if TYPE_CHECKING:
    from torchft.coordination.manager_server import ManagerServer

__all__ = ["ManagerService", "register"]

logger = logging.getLogger(__name__)


def register(server: grpc.aio.Server, manager: ManagerServer, ranks: SessionService) -> None:
    """Adds the services of a ManagerServer to a gRPC server."""
    pb_grpc.add_ManagerServiceServicer_to_server(ManagerService(manager), server)
    session_pb2_grpc.add_SessionServiceServicer_to_server(ranks, server)


class ManagerService(pb_grpc.ManagerServiceServicer):
    """The gRPC face of a ManagerServer."""

    def __init__(self, server: ManagerServer) -> None:
        self._server = server

    async def Quorum(
        self,
        request: pb.ManagerQuorumRequest,
        context: grpc.aio.ServicerContext[pb.ManagerQuorumRequest, pb.ManagerQuorumResponse],
    ) -> pb.ManagerQuorumResponse:
        ask = Ask(int(request.group_rank), request, _deadline_of(context))
        try:
            quorum = await self._server.wait_quorum(ask)
            view = quorum.view(ask.rank, request.init_sync)
        except ValueError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except TimeoutError as e:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(e))
        except (RuntimeError, AssignmentError) as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
        return types.view_to_wire(view)

    async def ShouldCommit(
        self,
        request: pb.ShouldCommitRequest,
        context: grpc.aio.ServicerContext[pb.ShouldCommitRequest, pb.ShouldCommitResponse],
    ) -> pb.ShouldCommitResponse:
        rank = int(request.group_rank)
        try:
            ballot = self._server.cast(rank, request.step, request.should_commit)
        except ValueError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
        try:
            voted = await asyncio.wrap_future(ballot)
        except asyncio.CancelledError:
            self._server.uncast(rank, ballot, "its call ended (deadline, or the process is gone)")
            raise
        except RuntimeError as e:
            await context.abort(grpc.StatusCode.ABORTED, str(e))
        return pb.ShouldCommitResponse(should_commit=voted.commit, next_stands=voted.next_stands)

    async def CheckpointMetadata(
        self,
        request: pb.CheckpointMetadataRequest,
        context: grpc.aio.ServicerContext[pb.CheckpointMetadataRequest, pb.CheckpointMetadataResponse],
    ) -> pb.CheckpointMetadataResponse:
        try:
            metadata = self._server.checkpoint_metadata(int(request.rank))
        except KeyError:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"rank {request.rank} of {self._server.replica_id} serves no checkpoint",
            )
        return pb.CheckpointMetadataResponse(checkpoint_metadata=metadata)

    async def Kill(
        self, request: pb.KillRequest, context: grpc.aio.ServicerContext[pb.KillRequest, pb.KillResponse]
    ) -> pb.KillResponse:
        logger.error("[%s] killed on request of %s: %s", self._server.replica_id, context.peer(), request.msg)
        logging.shutdown()
        os._exit(1)


def _deadline_of(
    context: grpc.aio.ServicerContext[pb.ManagerQuorumRequest, pb.ManagerQuorumResponse],
) -> Deadline:
    remaining = context.time_remaining()
    return Deadline(remaining if remaining is not None else 24 * 3600)
