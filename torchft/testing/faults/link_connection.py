"""One connection of a link: two sockets, two directions, and the weather they all live in.

Each direction is a reader, which notes when a piece arrived, and a writer, which passes it on when it may. Between them
is a queue with a bound, so that a slow receiver slows the sender down, as without the proxy.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import Any

__all__ = ["Weather", "carry", "reset"]

_PIECE = 256 * 1024
_BOUND = 8 * 1024 * 1024
_BOUND_LATE = 256 * 1024 * 1024
"""Bytes on their way in one direction of one connection. With a delay it has to hold delay times bandwidth."""
_BURST = 0.02
"""Seconds of a limited rate that may pass at once. Timers wake late: what was missed by then is made up for."""


class Weather:
    """What a link does to its connections now. Lives on the link's loop; all waits look again when it changes."""

    def __init__(self) -> None:
        self.blocked = False
        self.delay = 0.0
        self.rate: float | None = None
        self._free_at = [0.0, 0.0]  # of each direction: when it may carry the next byte
        self._changed = asyncio.Event()

    def change(self, **state: Any) -> None:
        """Sets ``blocked``, ``delay`` or ``rate``, and wakes all that wait for a change."""
        for name, value in state.items():
            setattr(self, name, value)
        self._free_at = [0.0, 0.0]
        self._changed.set()
        self._changed = asyncio.Event()

    async def unblocked(self) -> None:
        while self.blocked:
            await self._changed.wait()

    async def may_pass(self, arrived: float) -> None:
        """Returns when what arrived at that time is late enough and nothing is blocked."""
        while True:
            await self.unblocked()
            early = arrived + self.delay - asyncio.get_running_loop().time()
            if early <= 0:
                return
            await self._wait_for_change(early)

    async def turn(self, direction: int, size: int) -> int:
        """Returns, when it may be sent, how much of ``size`` bytes may be sent now."""
        while self.rate is not None:
            wait = self._free_at[direction] - asyncio.get_running_loop().time()
            if wait <= 0:
                return min(size, max(1, int(self.rate * _BURST)))
            await self._wait_for_change(wait)
            await self.unblocked()
        return size

    def sent(self, direction: int, size: int) -> None:
        if self.rate is not None:
            now = asyncio.get_running_loop().time()
            self._free_at[direction] = max(now - _BURST, self._free_at[direction]) + size / self.rate

    async def _wait_for_change(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            pass


async def carry(client: socket.socket, target: tuple[str, int], weather: Weather) -> None:
    """Connects to the target and carries both directions until both ends have ended their streams.

    Closes the client. However else it ends, cancelled or by an error at one end, both ends see a reset.

    Raises:
        OSError: what one of the ends failed with.
    """
    client.setblocking(False)
    server: socket.socket | None = None
    try:
        await weather.unblocked()
        server = await _connect(target)
        for s in (client, server):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.TaskGroup() as tasks:
                for direction, (source, sink) in enumerate(((client, server), (server, client))):
                    queue = _Queue()
                    tasks.create_task(_read(source, queue, weather))
                    tasks.create_task(_write(sink, queue, weather, direction))
        except* OSError as failed:
            raise failed.exceptions[0] from None
        client.close()
        server.close()
    finally:
        reset(client)
        if server is not None:
            reset(server)


def reset(s: socket.socket) -> None:
    """Closes the socket so that the other end sees a reset. Does nothing to one that is closed."""
    if s.fileno() >= 0:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()


class _Queue:
    """What is on its way in one direction: pieces with the times at which they arrived.

    An empty piece is the end of the stream; an error is the end of the connection.
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[float, bytes | OSError]] = deque()
        self._size = 0
        self._filled = asyncio.Event()
        self._room = asyncio.Event()

    def put(self, piece: bytes | OSError) -> None:
        self._pieces.append((asyncio.get_running_loop().time(), piece))
        self._size += len(piece) if isinstance(piece, bytes) else 0
        self._filled.set()

    async def first(self) -> tuple[float, bytes | OSError]:
        """The oldest piece, which stays until :meth:`drop`."""
        while not self._pieces:
            self._filled.clear()
            await self._filled.wait()
        return self._pieces[0]

    def drop(self) -> None:
        _, piece = self._pieces.popleft()
        self._size -= len(piece) if isinstance(piece, bytes) else 0
        self._room.set()

    async def room(self, bound: int) -> None:
        while self._size >= bound:
            self._room.clear()
            await self._room.wait()


async def _connect(target: tuple[str, int]) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = socket.getaddrinfo(*target, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name: looking it up may take long
        found = await loop.getaddrinfo(*target, type=socket.SOCK_STREAM)
    error = OSError(f"{target[0]}:{target[1]} has no address")
    for family, kind, proto, _, address in found:
        s = socket.socket(family, kind, proto)
        s.setblocking(False)
        try:
            await loop.sock_connect(s, address)
        except OSError as e:
            s.close()
            error = e
        except BaseException:
            s.close()
            raise
        else:
            return s
    raise error


async def _read(source: socket.socket, queue: _Queue, weather: Weather) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await weather.unblocked()
        await queue.room(_BOUND_LATE if weather.delay else _BOUND)
        try:
            piece = await loop.sock_recv(source, _PIECE)
        except OSError as e:
            queue.put(e)
            return
        queue.put(piece)
        if not piece:
            return


async def _write(sink: socket.socket, queue: _Queue, weather: Weather, direction: int) -> None:
    while True:
        arrived, piece = await queue.first()
        await weather.may_pass(arrived)
        if isinstance(piece, OSError):
            raise piece
        if not piece:
            sink.shutdown(socket.SHUT_WR)
            return
        rest = memoryview(piece)
        while rest:
            # Asked before each send: what is blocked in the middle of a piece stays.
            size = await weather.turn(direction, len(rest))
            await weather.unblocked()
            try:
                sent = sink.send(rest[:size])
            except BlockingIOError:
                await _writable(sink)
                continue
            weather.sent(direction, sent)
            rest = rest[sent:]
        queue.drop()


async def _writable(sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sink, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(sink)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():  # called again as long as nobody sends
        ready.set_result(None)
