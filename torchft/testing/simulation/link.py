"""A group's connection to its lighthouse: a session that is opened again, and requests that are sent again.

Mirrors ``coordination/lighthouse_link.py``, ``coordination/session_client.py`` and ``coordination/lighthouses.py``
(which of several lighthouses is asked): the same retries, pauses and attempt numbers, without threads and gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torchft.core.election import EpochGuard
from torchft.core.membership import Member, Quorum
from torchft.testing.simulation.network import CLIENT, Network, Stream
from torchft.testing.simulation.world import Process, Timer

__all__ = ["Answer", "Link", "LinkOwner", "Server"]

Answer = Callable[[Quorum | None, str, float], None]
"""Given the quorum, or None and the cause, or None and nothing: go on with the one there is; and when the request was
sent, by the member's clock."""

_PING = 0.3
"""Between pings, in heartbeat timeouts."""
_BEATS = 4
"""Signs of life per heartbeat timeout. The real shell sends five; a simulation that sends fewer is faster."""


class Server(Protocol):
    """A lighthouse, as far as connecting to it goes."""

    process: Process

    def accept(self, net: Network, client: Process, at_client: Any) -> Stream | None:
        """A stream to it, if it can be reached."""


class LinkOwner(Protocol):
    """Who has to know what the lighthouse says."""

    def hello(self) -> tuple[Any, ...]:
        """What a session begins with."""

    def told(self, message: tuple[Any, ...]) -> None:
        """A message that is not an answer to a request."""

    def welcomed(self, message: tuple[Any, ...], sent_at: float) -> None:
        """The session stands; its hello was sent at this time of the member's clock."""

    def beat(self) -> int:
        """The number of the sign of life that is sent now; 0: no answer is needed."""


class Link:
    """One life of a group's link.

    Args:
        process: of the group's rank 0.
        net: the network.
        servers: the lighthouses of ``TORCHFT_LIGHTHOUSE``, in that order.
        owner: told what comes.
        heartbeat_timeout: of the lighthouse; the real shell learns it from the welcome.
    """

    def __init__(
        self, process: Process, net: Network, servers: Sequence[Server], owner: LinkOwner, heartbeat_timeout: float
    ) -> None:
        self.process = process
        self.stands = False
        self._net = net
        self._servers = servers
        self._guard = EpochGuard()
        self._at = 0
        self._heartbeat_timeout = heartbeat_timeout
        self._owner = owner
        self._interval = heartbeat_timeout / _BEATS
        self._stream: Stream | None = None
        self._pause = 0.02
        self._request = 0
        self._asked: tuple[int, Member, Answer] | None = None
        self._sent_at = 0.0
        self._hello_at = 0.0
        self._closed = False
        self._beats: Timer | None = None
        process.after(0.0, self._connect)

    # --------------------------------------------------------------- requests

    def ask(self, member: Member, answer: Answer) -> None:
        """Asks for the next quorum. An earlier request of this link is given up.

        The same request goes out again on each new session until it is answered or withdrawn.
        """
        self._request += 1
        self._asked = self._request, member, answer
        self._send_request()

    def _send_request(self) -> None:
        if self.stands and self._asked is not None:
            self._sent_at = self.process.time
            self.say(("ready", self._asked[0], self._asked[1]))

    def withdraw(self) -> None:
        """The caller no longer waits."""
        if self._asked is not None:
            self.say(("withdraw", self._asked[0]))
            self._asked = None

    def forget(self) -> None:
        """The question has been answered in another way."""
        self._asked = None

    def say(self, message: tuple[Any, ...]) -> None:
        """Says something, if the session stands."""
        if self.stands and self._stream is not None:
            self._stream.send(CLIENT, message)

    def close(self) -> None:
        """Ends the session without a word."""
        self._closed = True
        if self._stream is not None:
            self._stream.close(CLIENT)

    # ---------------------------------------------------------------- session

    @property
    def epoch(self) -> int:
        """The highest that was seen."""
        return self._guard.highest

    def _connect(self) -> None:
        if self._closed:
            return
        server = self._servers[self._at]
        self._stream = server.accept(self._net, self.process, self)
        if self._stream is None:
            self._leave("")
            self._again()
            return
        self._hello_at = self.process.time
        self._stream.send(CLIENT, (*self._owner.hello(), self.epoch))
        if len(self._servers) > 1:
            self.process.after(_PING * self._heartbeat_timeout, self._ping, self._stream, server, False)

    def _ping(self, stream: Stream, server: Server, before: bool) -> None:
        """With several lighthouses, one that does not answer pings is left."""
        if stream is not self._stream or self._closed:
            return
        silent = server.process.paused or self._net.apart(self.process.name, server.process.name)
        if silent and before:
            stream.close(CLIENT)
            self._lost("pings are not answered", "")
            return
        self.process.after(_PING * self._heartbeat_timeout, self._ping, stream, server, silent)

    def _leave(self, leader: str) -> None:
        """The current lighthouse is not the one to ask."""
        names = [server.process.name for server in self._servers]
        self._at = names.index(leader) if leader in names else (self._at + 1) % len(names)

    def _again(self) -> None:
        pause = self._pause * (0.5 + 0.5 * self.process.world.rng.random())
        self._pause = min(1.0, 2 * self._pause)
        self.process.after(pause, self._connect)

    def received(self, stream: Stream, message: tuple[Any, ...]) -> None:
        if stream is not self._stream:
            return
        kind = message[0]
        if kind == "answer":
            asked = self._asked
            if asked is not None and asked[0] == message[1]:
                self._asked = None
                asked[2](message[2], message[3], self._sent_at)
            return
        if kind == "redirect":
            stream.close(CLIENT)
            self._lost("it does not lead", message[1])
            return
        if kind == "welcome":
            if not self._guard.admit(message[4]):
                self.process.world.point("refused by epoch", self.process.name)
                stream.close(CLIENT)
                self._lost("it was deposed", "")
                return
            self.stands = True
            self._pause = 0.02
            if self._beats is None:
                self._beats = self.process.after(self._interval, self._beat)
            self._owner.welcomed(message, self._hello_at)
            self._send_request()
            return
        self._owner.told(message)

    def ended(self, stream: Stream, cause: str) -> None:
        if stream is self._stream and not self._closed:
            self._lost(cause, None if self.stands else "")  # after a session the same one is tried once more

    def _lost(self, cause: str, leader: str | None) -> None:
        if leader is not None:
            self._leave(leader)
        if self.process.world.trace is not None:
            self.process.world.tell(self.process.name, "its session is lost: %s", cause)
        self.stands = False
        self._stream = None
        self._owner.told(("lost",))
        self._again()

    def _beat(self) -> None:
        if self._closed:
            return
        self._beats = self.process.after(self._interval, self._beat)
        self.beat_now()

    def beat_now(self) -> None:
        """A sign of life, now."""
        if self.stands:
            self.say(("beat", self._owner.beat()))
