"""The sessions of a group's other ranks to their rank 0: any rank's death is seen in the group.

What happens on a session becomes a call of the ManagerServer that rank 0 hosts; everything runs on the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchft.coordination.proto import session_pb2 as pb
from torchft.coordination.session_server import Link, SessionService
from torchft.runtime.life import life_address

if TYPE_CHECKING:
    from torchft.coordination.manager_server import ManagerServer

__all__ = ["RANK_HEARTBEAT_TIMEOUT", "RankSessions"]

RANK_HEARTBEAT_TIMEOUT = 5.0
"""Seconds after which a rank that is stopped or cut off counts as dead in its group, rank 0 included."""


class RankSessions:
    """The owner of the sessions.

    Args:
        server: told what happens.
        hostname: of this machine as the other ranks are told it; chosen by the route when empty.
    """

    def __init__(self, server: ManagerServer, hostname: str) -> None:
        self._server = server
        self._life_address = life_address(None, hostname)
        self.service = SessionService(self, RANK_HEARTBEAT_TIMEOUT)

    def elsewhere(self) -> str | None:
        return None

    async def arriving(self, hello: pb.Hello) -> None:
        """Every rank is welcome."""

    def opened(self, link: Link, hello: pb.Hello) -> pb.Welcome:
        self._server.rank_is_there(link.rank)
        return pb.Welcome(life_address=self._life_address, heartbeat_timeout_ms=round(1000 * RANK_HEARTBEAT_TIMEOUT))

    def beat(self, link: Link, number: int) -> None:
        """The connection's own pings tell who lives; the answer is what a silence is counted from when it was lost."""
        if number:
            link.send(pb.SessionDown(heard=pb.Heard(number=number)))

    def left(self, link: Link, reason: str, step: int) -> None:
        self._server.rank_left(link.rank, reason, step)

    def lost(self, link: Link) -> None:
        """It may come back: nothing happens yet."""

    def gone(self, link: Link, cause: str) -> None:
        self._server.rank_died(link.rank, cause)

    def silent(self, link: Link, cause: str) -> None:
        self._server.rank_died(link.rank, cause)

    def ready(self, link: Link, message: pb.Ready) -> None:
        refusal = pb.Answer(request_id=message.request_id, error="ranks ask by ManagerService.Quorum")
        link.send(pb.SessionDown(answer=refusal))

    def acked(self, link: Link, message: pb.Ack) -> None:
        """Nothing was asked."""

    def drains(self, link: Link) -> None:
        """A group drains as a whole, by its rank 0."""

    def withdrawn(self, link: Link, request_id: int) -> None:
        """Nothing was asked for."""

    def reported(self, replica_id: str, cause: str) -> bool:
        return False
