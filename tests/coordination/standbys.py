"""Lighthouses of one job in this process, and the groups and bare calls that ask them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torchft.coordination import LighthouseServer, ManagerServer
from torchft.coordination.channel import open_channel
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.testing.wait import wait_until

MINUTE = timedelta(minutes=1)


class Lights:
    """Lighthouses of one job in this process."""

    def __init__(self) -> None:
        self.servers: list[LighthouseServer] = []

    def start(self, ha: str, lease_ms: int = 5000, **kwargs: Any) -> LighthouseServer:
        options = {"min_replicas": 1, "heartbeat_timeout_ms": 2000, "join_timeout_ms": 100, **kwargs}
        server = LighthouseServer("127.0.0.1:0", ha=ha, ha_lease_ms=lease_ms, **options)
        self.servers.append(server)
        return server

    def leader(self) -> LighthouseServer:
        wait_until(lambda: any(s.epoch for s in self.servers), what="that one leads")
        return next(s for s in self.servers if s.epoch)

    def others(self) -> list[LighthouseServer]:
        leader = self.leader()
        return [s for s in self.servers if s is not leader]

    def addresses(self) -> str:
        return ",".join(s.address() for s in self.servers)

    def end(self, server: LighthouseServer) -> None:
        self.servers.remove(server)
        server.shutdown()


@contextmanager
def member(lighthouses: str, replica_id: str = "a", sessions: bool = True) -> Iterator[ManagerServer]:
    tenth = timedelta(milliseconds=100)
    server = ManagerServer(
        replica_id, lighthouses, "", "127.0.0.1:0", "store:1", 1, tenth, MINUTE, 0, sessions=sessions
    )
    try:
        yield server
    finally:
        server.leave("the test ends", 3)
        server.shutdown()


def ask(server: ManagerServer) -> int:
    """The epoch of a new quorum, after an old one broke."""
    return server._quorum(0, 3, "", False, MINUTE, 1).quorum_id >> 32


def call(server: LighthouseServer, epoch: int = 0) -> pb.LighthouseQuorumResponse:
    """A bare call at this very lighthouse."""
    with open_channel(server.address()) as channel:
        request = pb.LighthouseQuorumRequest(requester=pb.QuorumMember(replica_id="bare"), epoch=epoch)
        return pb_grpc.LighthouseServiceStub(channel).Quorum(request, timeout=60, wait_for_ready=True)
