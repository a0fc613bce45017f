"""The server's side of sessions: who is connected, who was lost, and whether that was a death.

The idea
    A member keeps one stream open (proto/session.proto). When the stream ends without a word, this side finds out
    why: it looks at the member's life address (:mod:`torchft.runtime.life`) again and again. Refused: the process
    has died, known within milliseconds. Accepted: it lives, only its connection was lost, and it will be back.
    No answer, or none for ``heartbeat_timeout``: it is *silent*, and the owner decides by the clock.

Rules
    - gRPC's pings (``GrpcServer(heartbeat_timeout=…)``) end the stream of a process that is stopped or unreachable
      shortly before ``heartbeat_timeout`` after its last sign. They are answered by threads that need no GIL.
    - A member that says hello again replaces its former stream: that one's end means nothing then.
    - A member that does not read loses the oldest of what it should be told, never our memory.

Everything here runs on the background loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

import grpc
import grpc.aio

from torchft.coordination.lighthouses import LEADER_KEY
from torchft.coordination.proto import session_pb2 as pb
from torchft.coordination.proto import session_pb2_grpc as pb_grpc
from torchft.runtime.life import Sign, examine

__all__ = ["Link", "SessionOwner", "SessionService", "refuse_elsewhere"]

logger = logging.getLogger(__name__)

_LOOKS = (0.0, 0.01, 0.03, 0.1, 0.3)
"""Pauses in seconds between the looks at a lost member; from then on the last one again and again."""
_PROOFS = (1.0, 3.0, 10.0)
"""Pauses in seconds between the looks that follow a first one which did not show that a member can be seen to die."""
_MAX_TEXT = 4096
_MAX_UNREAD = 4096
_Up = grpc.aio.ServicerContext[pb.SessionUp, pb.SessionDown]


async def refuse_elsewhere(leader: str | None, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Ends a call that another lighthouse has to answer, see :meth:`SessionOwner.elsewhere`. It does not return then.

    Clients that do not know of standbys read it in the message, ours in the trailing metadata.
    """
    if leader is not None:
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            f"this lighthouse does not lead: {leader} does"
            if leader
            else "this lighthouse does not lead, and knows nobody that does right now: try again",
            ((LEADER_KEY, leader),),
        )


class Link:
    """A member's open stream."""

    def __init__(self, hello: pb.Hello) -> None:
        self.replica_id = hello.replica_id
        self.rank = int(hello.group_rank)
        self.life_address = hello.life_address
        self.provable = False
        """Its life address was seen to accept: a refusal proves its death."""
        self.proof: asyncio.Task[None] | None = None
        """The look that tells whether it is provable."""
        self.standing = hello.standing
        """It speaks standing quorums."""
        self.last_sign = time.monotonic()
        self._unsent: asyncio.Queue[pb.SessionDown | None] = asyncio.Queue()

    @property
    def key(self) -> tuple[str, int]:
        return self.replica_id, self.rank

    def send(self, message: pb.SessionDown | None) -> None:
        """Tells the member something; None ends the stream after what was said before."""
        if self._unsent.qsize() >= _MAX_UNREAD:
            self._unsent.get_nowait()
        self._unsent.put_nowait(message)

    def send_first(self, message: pb.SessionDown) -> None:
        """As :meth:`send`, before all that is not sent yet."""
        waiting = [self._unsent.get_nowait() for _ in range(self._unsent.qsize())]
        for each in (message, *waiting):
            self._unsent.put_nowait(each)

    async def write(self, context: _Up) -> None:
        """Carries out what :meth:`send` was given, until it ends the stream."""
        while (message := await self._unsent.get()) is not None:
            await context.write(message)


class SessionOwner(Protocol):
    """Who has to know. All are called on the loop and must not block."""

    def elsewhere(self) -> str | None:
        """Who is asked instead of this server: an address, empty if it is not known; None: this one answers."""

    async def arriving(self, hello: pb.Hello) -> None:
        """Somebody wants to be a member. When this returns, :meth:`elsewhere` is looked at.

        Raises:
            ValueError: the hello makes no sense.
            RuntimeError: it cannot be served.
        """

    def opened(self, link: Link, hello: pb.Hello) -> pb.Welcome:
        """A member is there. Returns the answer; what is sent to the link meanwhile follows it."""

    def beat(self, link: Link, number: int) -> None:
        """A member said something. If the number is not 0 it wants an answer."""

    def left(self, link: Link, reason: str, step: int) -> None:
        """A member goes on purpose. It is told when this has returned."""

    def lost(self, link: Link) -> None:
        """A member's stream ended; why is not known yet. It may come back."""

    def gone(self, link: Link, cause: str) -> None:
        """A lost member's process has ended."""

    def silent(self, link: Link, cause: str) -> None:
        """A lost member did not come back for ``heartbeat_timeout`` since its last sign."""

    def ready(self, link: Link, message: pb.Ready) -> None:
        """A member asks for the next quorum. The answer goes to the link."""

    def acked(self, link: Link, message: pb.Ack) -> None:
        """A member says how far it is."""

    def drains(self, link: Link) -> None:
        """A member wants to go at the next change of the members."""

    def withdrawn(self, link: Link, request_id: int) -> None:
        """A member no longer waits for the answer."""

    def reported(self, replica_id: str, cause: str) -> bool:
        """Somebody says that a replica is dead. Returns whether it counted as alive."""


class SessionService(pb_grpc.SessionServiceServicer):
    """The handlers of the gRPC service.

    Args:
        owner: told what happens.
        heartbeat_timeout: seconds.
    """

    def __init__(self, owner: SessionOwner, heartbeat_timeout: float) -> None:
        self._owner = owner
        self._heartbeat_timeout = heartbeat_timeout
        self._links: dict[tuple[str, int], Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def broadcast(self, message: pb.SessionDown) -> None:
        """Tells all members."""
        for link in self._links.values():
            link.send(message)

    def link(self, replica_id: str, rank: int = 0) -> Link | None:
        """A member's open stream."""
        return self._links.get((replica_id, rank))

    def redirect(self, leader: str) -> None:
        """Sends all members away, to ``leader`` if it is not empty. Nothing is said of them any more."""
        links, self._links = self._links, {}
        for link in links.values():
            link.send(pb.SessionDown(redirect=pb.Redirect(leader=leader)))
            link.send(None)

    def close(self) -> None:
        """From now on the end of a stream means that this server ends. On the loop."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    # ----------------------------------------------------------------- RPCs

    async def Session(self, request_iterator: object, context: _Up) -> None:
        first = await context.read()
        hello = first.hello if isinstance(first, pb.SessionUp) and first.WhichOneof("kind") == "hello" else None
        if hello is None or not hello.replica_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with a hello that has a name")
            raise AssertionError("abort raises")
        if len(hello.replica_id) > _MAX_TEXT or len(hello.life_address) > _MAX_TEXT:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the hello is too long")
        try:
            await self._owner.arriving(hello)
        except ValueError as e:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except RuntimeError as e:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(e))
        leader = self._owner.elsewhere()
        if leader is not None:
            await context.write(pb.SessionDown(redirect=pb.Redirect(leader=leader)))
            return
        link = Link(hello)
        former = self._links.pop(link.key, None)
        if former is not None:
            former.send(None)
        self._links[link.key] = link
        welcome = self._owner.opened(link, hello)
        link.send_first(pb.SessionDown(welcome=welcome))
        link.proof = self._start(self._prove(link))
        writer = asyncio.ensure_future(link.write(context))
        reader = asyncio.ensure_future(self._read(link, context))
        left = False
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            left = reader.done() and not reader.cancelled() and reader.exception() is None and reader.result()
            if left:
                link.send(pb.SessionDown(left=pb.Left()))
                link.send(None)
                await writer
        finally:
            writer.cancel()
            reader.cancel()
            if self._links.get(link.key) is link:
                del self._links[link.key]
                if not left and not self._closed:
                    self._owner.lost(link)
                    self._start(self._find_out(link))

    async def ReportFailure(
        self, request: pb.Report, context: grpc.aio.ServicerContext[pb.Report, pb.ReportAnswer]
    ) -> pb.ReportAnswer:
        if not request.replica_id or len(request.cause) > _MAX_TEXT:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a report names a replica and a short cause")
        await refuse_elsewhere(self._owner.elsewhere(), context)
        return pb.ReportAnswer(known=self._owner.reported(request.replica_id, request.cause))

    # ------------------------------------------------------------- a stream

    async def _read(self, link: Link, context: _Up) -> bool:
        """Until the stream ends. Returns whether the member left on purpose."""
        while True:
            message = await context.read()
            if not isinstance(message, pb.SessionUp):  # the end
                return False
            link.last_sign = time.monotonic()
            kind = message.WhichOneof("kind")
            if kind == "leave":
                if self._links.get(link.key) is link:
                    del self._links[link.key]  # the others are told, it knows
                self._owner.left(link, message.leave.reason[:_MAX_TEXT], message.leave.step)
                return True
            if kind == "ready":
                self._owner.ready(link, message.ready)
                continue
            if kind == "beat":
                self._owner.beat(link, message.beat.number)
                continue
            if kind == "ack":
                self._owner.acked(link, message.ack)
            elif kind == "drain":
                self._owner.drains(link)
            elif kind == "withdraw":
                self._owner.withdrawn(link, message.withdraw.request_id)
            elif kind == "report":
                self._owner.reported(message.report.replica_id, message.report.cause[:_MAX_TEXT])
            self._owner.beat(link, 0)

    # ---------------------------------------------------------- who is lost

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _prove(self, link: Link) -> None:
        """The first look. Where it shows nothing, others follow: on a busy machine a second is not much."""
        if link.life_address and not await self._seen(link):
            self._start(self._prove_later(link))

    async def _prove_later(self, link: Link) -> None:
        for pause in _PROOFS:
            await asyncio.sleep(pause)
            if self._links.get(link.key) is not link or await self._seen(link):
                return

    async def _seen(self, link: Link) -> bool:
        link.provable = link.provable or await examine(link.life_address) is Sign.ALIVE
        return link.provable

    async def _find_out(self, link: Link) -> None:
        """Why a member was lost, unless it comes back."""
        deadline = link.last_sign + self._heartbeat_timeout
        for pause in itertools.chain(_LOOKS, itertools.repeat(_LOOKS[-1])):
            remaining = max(0.0, deadline - time.monotonic())
            await asyncio.sleep(min(pause, remaining))
            if link.key in self._links:
                return
            if link.provable and await examine(link.life_address) is Sign.GONE:
                if link.key not in self._links:
                    self._owner.gone(link, "its process has ended: the connection was closed and its port refuses")
                return
            if remaining <= 0:
                silence = time.monotonic() - link.last_sign
                self._owner.silent(link, f"no sign of life for {silence:.1f} s: stopped, or cut off")
                return
