"""The network: latencies, cuts, connections that end in different ways, and proofs of life.

The idea
    Sessions and calls run on *streams*, which behave as a TCP connection under gRPC does (mirrors
    ``coordination/channel.py`` and ``coordination/session_server.py``): within a stream messages arrive in order and
    once, and when it breaks what was under way is lost. Who sends again on a new stream makes the doubled messages.

Rules
    - A cut is directed, so a partition can be one-way. What is sent into a cut waits in the kernel and arrives when
      the cut heals, unless the stream has ended by then.
    - A process that dies closes its streams: the other end sees that at once if the way is open. What it had sent
      before arrives or is lost, by chance. A machine that is gone closes nothing.
    - The server of a stream pings; when that was in vain for nine tenths of the heartbeat timeout (cut in either
      direction, client stopped, machine gone) it ends its side. The client learns of it when the way is open again.
    - A look at a life address is answered by the kernel: it accepts while the process exists, stopped or not, and
      refuses afterwards; through a cut nobody answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from torchft.runtime.life import Sign
from torchft.testing.simulation.world import Process, World

__all__ = ["End", "Network", "Stream"]

_FIN = object()
CLIENT, SERVER = 0, 1


class End(Protocol):
    """Who holds an end of a stream."""

    def received(self, stream: Stream, message: Any) -> None:
        """A message arrived."""

    def ended(self, stream: Stream, cause: str) -> None:
        """The stream is over; nothing more arrives. Not called at an end that closed it itself."""


class Network:
    """All links between the machines.

    Args:
        world: where.
        ping_timeout: seconds after which the server of a stream gives up a client that does not answer.
        latency: shortest way from one machine to another, in seconds; by chance up to four times that.
    """

    def __init__(self, world: World, ping_timeout: float, latency: float = 0.001) -> None:
        self.world = world
        self.ping_timeout = ping_timeout
        self._latency = latency
        self._cuts: Counter[tuple[str, str]] = Counter()
        self._late: dict[tuple[str, str], float] = {}
        self._streams: dict[Stream, None] = {}

    # ----------------------------------------------------------------- links

    def latency(self, source: str, target: str) -> float:
        """How long a message takes now, in seconds."""
        way = self._latency * (1.0 + 3.0 * self.world.rng.random())
        return way + self._late[source, target] if (source, target) in self._late else way

    def is_cut(self, source: str, target: str) -> bool:
        """Whether nothing gets through in this direction."""
        return bool(self._cuts) and (source, target) in self._cuts

    def apart(self, one: str, other: str) -> bool:
        """Whether the two cannot talk: cut in one direction at least."""
        return bool(self._cuts) and ((one, other) in self._cuts or (other, one) in self._cuts)

    def cut(self, source: str, target: str) -> None:
        """Nothing gets through from now on, in this direction. Cuts add up; each needs its own :meth:`mend`."""
        self._cuts[source, target] += 1
        self.look_for_silence()

    def mend(self, source: str, target: str) -> None:
        """Ends a cut; what waits in the kernels arrives."""
        self._cuts[source, target] -= 1
        if self._cuts[source, target] <= 0:
            del self._cuts[source, target]
        self.look_for_silence()
        for stream in list(self._streams):
            stream.flush()

    def delay(self, source: str, target: str, more: float) -> None:
        """Messages in this direction take so many seconds more, from now on; 0: as usual."""
        if more > 0:
            self._late[source, target] = more
        else:
            self._late.pop((source, target), None)

    # --------------------------------------------------------------- streams

    def connect(self, client: Process, server: Process, at_client: End, at_server: End) -> Stream:
        """A stream between two processes that live and can reach each other."""
        stream = Stream(self, client, server, at_client, at_server)
        self._streams[stream] = None
        return stream

    def reachable(self, client: Process, server: Process) -> bool:
        """Whether a new connection would be accepted by a process that can answer."""
        return server.alive and not server.paused and not self.apart(client.name, server.name)

    def forget(self, stream: Stream) -> None:
        """Both ends know that it is over."""
        self._streams.pop(stream, None)

    def died(self, process: Process) -> None:
        """The process, or with ``host_up`` False its machine, is gone: its streams end."""
        for stream in [s for s in self._streams if process in (s.client, s.server)]:
            stream.died(CLIENT if stream.client is process else SERVER, process.host_up)
        self.look_for_silence()

    def back(self, process: Process) -> None:
        """The process's machine answers again: what belonged to an earlier life is refused."""
        for stream in list(self._streams):
            stream.flush()

    def break_streams(self, one: str, other: str) -> int:
        """Something between the two drops their connections. Returns how many."""
        hit = [s for s in self._streams if {s.client.name, s.server.name} == {one, other} and s.whole]
        for stream in hit:
            stream.break_()
        return len(hit)

    def look_for_silence(self) -> None:
        """Something that matters to pings has changed."""
        for stream in self._streams:
            stream.listen()

    # --------------------------------------------------------- proofs of life

    def look(self, process: Process, at: Process, life: int, answer: Callable[[Sign], None]) -> None:
        """``process`` looks at the life address of a life of another one."""
        way = self.latency(process.name, at.name) + self.latency(at.name, process.name)
        if self.apart(process.name, at.name) or not at.host_up:
            self.world.to(process, 0.1 * self.ping_timeout, answer, Sign.UNKNOWN)
        else:
            self.world.to(process, way, answer, Sign.ALIVE if at.alive and at.life == life else Sign.GONE)


class Stream:
    """One connection. Ends are named by :data:`CLIENT` and :data:`SERVER`."""

    __slots__ = (
        "_dropped", "_ends", "_held", "_last", "_lives", "_names", "_net", "_silent_since",
        "client", "open", "server",
    )  # fmt: skip

    def __init__(self, net: Network, client: Process, server: Process, at_client: End, at_server: End) -> None:
        self._net = net
        self.client = client
        self.server = server
        self._ends = (at_client, at_server)
        self._names = (client.name, server.name)
        self._lives = (client.life, server.life)
        self.open = [True, True]
        self._dropped = [False, False]
        self._held: tuple[list[object], list[object]] = ([], [])
        self._last = [0.0, 0.0]
        self._silent_since: float | None = None

    @property
    def whole(self) -> bool:
        """Open at both ends."""
        return self.open[0] and self.open[1]

    def send(self, end: int, message: object) -> None:
        """``end`` says something. Nothing happens if its side is over."""
        if self.open[end]:
            self._carry(end, message)

    def _carry(self, end: int, message: object) -> None:
        to = 1 - end
        names = self._names
        net = self._net
        if self._held[to] or net.is_cut(names[end], names[to]):
            self._held[to].append(message)
            return
        world = net.world
        at = max(self._last[to], world.now + net.latency(names[end], names[to]))
        self._last[to] = at
        process = self.server if to else self.client
        if process.life == self._lives[to]:
            world.to(process, at - world.now, self._arrive, to, message)

    def _arrive(self, to: int, message: object) -> None:
        if not self.open[to]:
            return
        if message is _FIN:
            self._end(to, "the other side closed it")
        elif not self._dropped[to]:
            self._ends[to].received(self, message)

    def _end(self, end: int, cause: str) -> None:
        self.open[end] = False
        if not self.open[1 - end]:
            self._net.forget(self)
        self._ends[end].ended(self, cause)

    def close(self, end: int) -> None:
        """``end`` closes; what it had said arrives before the other one learns of it."""
        if not self.open[end]:
            return
        self.open[end] = False
        if self.open[1 - end]:
            self._carry(end, _FIN)
        else:
            self._net.forget(self)

    def died(self, end: int, host_up: bool) -> None:
        """The process at this end is gone."""
        was_open = self.open[end]
        self.open[end] = False
        if not self.open[1 - end]:
            self._net.forget(self)
        elif was_open and host_up:
            if self._net.world.rng.random() < 0.5:
                self._dropped[1 - end] = True
                self._held[1 - end].clear()
            self._carry(end, _FIN)
        elif was_open:
            self._held[1 - end].append(_FIN)  # the machine refuses when it is back

    def break_(self) -> None:
        """It is dropped under way: both ends learn of it, each in its time, and what was under way is lost."""
        rng = self._net.world.rng
        for end in (CLIENT, SERVER):
            if self.open[end]:
                self._dropped[end] = True
                process = self.server if end else self.client
                self._net.world.to(process, rng.random() * 0.02, self._broke, end)

    def _broke(self, end: int) -> None:
        if self.open[end]:
            self._end(end, "the connection was lost")

    def flush(self) -> None:
        """What waited for the way to open is carried, if it is open."""
        for end in (CLIENT, SERVER):
            to = 1 - end
            process = self.server if end else self.client
            if self._held[to] and not self._net.is_cut(self._names[end], self._names[to]) and process.host_up:
                held, rest = list(self._held[to]), self._held[to]
                rest.clear()
                for message in held:
                    self._carry(end, message)

    # ----------------------------------------------------------------- pings

    def listen(self) -> None:
        """Whether the server's pings are answered has perhaps changed."""
        net = self._net
        client = self.client
        answered = (
            client.host_up
            and not (client.paused and client.life == self._lives[0])
            and not net.apart(client.name, self.server.name)
        )
        if answered:
            self._silent_since = None
        elif self._silent_since is None and self.open[SERVER]:
            self._silent_since = net.world.now
            net.world.at(net.world.now + net.ping_timeout, self._in_vain, net.world.now)

    def _in_vain(self, since: float) -> None:
        if self._silent_since != since or not self.open[SERVER] or self.server.life != self._lives[1]:
            return
        if self.server.paused:  # it will notice when it is continued
            self._net.world.at(self._net.world.now + 0.1, self._in_vain, since)
            return
        self.open[SERVER] = False
        if self.open[CLIENT]:
            self._carry(SERVER, _FIN)
        else:
            self._net.forget(self)
        self._ends[SERVER].ended(self, "pings are not answered")
