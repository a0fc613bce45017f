"""The little of HTTP/1.1 that both ends of the transport need: heads, ranges, and bodies straight to and from memory.

Rules
    - A head is at most ``MAX_HEAD`` bytes and ``MAX_HEADERS`` lines; header names are lower case once read.
    - Bodies always have a ``Content-Length``; nothing is chunked or compressed.
    - Sockets are blocking; every call on one is bounded by the last :func:`set_timeout`.
    - Data is sent from and received into lists of ``memoryview`` (``sendmsg``, ``recvmsg_into``): no copy in Python.
"""

from __future__ import annotations

import itertools
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

from torchft.runtime.deadline import Deadline

__all__ = [
    "HASHED",
    "MAX_SAMPLE",
    "PIECE",
    "SCATTERED",
    "BodyReader",
    "HeadReader",
    "WireError",
    "content_range",
    "limit_calls",
    "parse_indices",
    "parse_range",
    "pieces",
    "scatter",
    "send_some",
    "send_views",
    "set_timeout",
]

MAX_HEAD = 16 << 10
MAX_HEADERS = 64
_TIMEVAL = struct.Struct("@ll")
_IOV = 256
SCATTERED = 16
"""Views of one piece that are received into as they are: smaller ones cost less to copy than to hand to the kernel."""
_CHECK = 0.1
_QUICK = 10e6
"""Bytes a second from which on whole pieces are waited for. Of what is slower, and of the first piece, bytes are handed
on as they come: who watches knows how slow it is, and whether it goes on."""

PIECE = 1 << 20
"""Bytes that are hashed and moved at a time: they stay in the second level's cache in between."""
HASHED = "application/x-torchft-hashed"
"""The content type of a body that has each chunk's hash after the chunk."""
MAX_SAMPLE = 16  # as _INDICES has it
"""Chunks whose hashes may be asked for at once, without asking for all."""


class WireError(OSError):
    """The other end closed the connection early, or does not speak HTTP/1.1."""


class HeadReader:
    """Reads message heads from a socket, and gives back what it read beyond them."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def head(self, deadline: Deadline) -> tuple[str, dict[str, str]] | None:
        """First line and headers of the next message; None if the other end closed between messages.

        Raises:
            WireError: it is not an HTTP head.
            TimeoutError: the deadline passed.
        """
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise WireError("the head is too long")
            set_timeout(self._sock, deadline)
            try:
                data = self._sock.recv(MAX_HEAD)
            except BlockingIOError as e:
                raise TimeoutError(f"no message came within {deadline.timeout:g}s") from e
            if not data:
                if self._buffer:
                    raise WireError("the connection was closed in the middle of a head")
                return None
            self._buffer += data
        return self._parse(end)

    @property
    def ready(self) -> bool:
        """Whether a whole head has come, or more than one may have: :meth:`head` does not wait."""
        return b"\r\n\r\n" in self._buffer or len(self._buffer) > MAX_HEAD

    def listen(self) -> bool:
        """Takes what has come, without waiting: whether it is :attr:`ready`.

        Raises:
            WireError: the other end closed the connection.
        """
        try:
            data = self._sock.recv(MAX_HEAD, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self.ready
        if not data:
            raise WireError("it was closed")
        self._buffer += data
        return self.ready

    def _parse(self, end: int) -> tuple[str, dict[str, str]]:
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        if len(lines) > MAX_HEADERS or end > MAX_HEAD:
            raise WireError("the head is too long")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise WireError(f"not a header line: {line[:60]!r}")
            headers[name.lower()] = value.strip()
        return lines[0], headers

    def take(self, views: Sequence[memoryview]) -> int:
        """Moves what was read beyond the head into ``views``; returns how many bytes."""
        taken = 0
        if not self._buffer:
            return 0
        for view in views:
            part = self._buffer[: len(view)]
            view[: len(part)] = part
            del self._buffer[: len(part)]
            taken += len(part)
            if not self._buffer:
                break
        return taken


def set_timeout(sock: socket.socket, deadline: Deadline) -> None:
    """Lets the next call on the socket block until the deadline.

    The kernel keeps the time: with Python's own timeouts each call would first poll, and would return as soon as a
    little has come.
    """
    left = deadline.remaining()
    if left <= 0:
        raise TimeoutError(f"no answer within {deadline.timeout:g}s")
    limit_calls(sock, left)


def limit_calls(sock: socket.socket, limit: float) -> None:
    """Lets each further call on the socket block for that many seconds at most."""
    value = _TIMEVAL.pack(int(limit), max(1, int(limit % 1 * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def send_some(sock: socket.socket, views: Sequence[memoryview]) -> int:
    """Sends what one call takes; how many bytes. 0: the other end took nothing within the last :func:`limit_calls`."""
    try:
        return sock.sendmsg(views if len(views) <= _IOV else views[:_IOV])
    except BlockingIOError:
        return 0


def send_views(sock: socket.socket, views: Sequence[memoryview], stall: float) -> None:
    """Sends all bytes.

    Raises:
        TimeoutError: the other end took nothing for ``stall`` seconds.
    """
    pending = [v for v in views if len(v)]
    moved_on = time.monotonic()
    while pending:
        sent = send_some(sock, pending)
        if not sent and time.monotonic() - moved_on > stall:
            raise TimeoutError("the other end takes nothing")
        if sent:
            moved_on = time.monotonic()
        _, pending = _split(pending, sent)


class BodyReader:
    """Reads the bodies of one connection, piece by piece, each handed on while it is in the cache.

    Args:
        sock: where from.
        reader: the reader of the heads; it may hold the first bytes.
        deadline: until when.
    """

    def __init__(self, sock: socket.socket, reader: HeadReader, deadline: Deadline) -> None:
        self._sock = sock
        self._reader = reader
        self._deadline = deadline
        self._checked = 0.0
        self._quick = False
        self._bounce: memoryview | None = None

    def fill(self, views: Sequence[memoryview], arrived: Callable[[memoryview], object] | None = None) -> None:
        """Fills all views with the next bytes.

        Args:
            views: where to.
            arrived: told each run of bytes right after it was written.

        Raises:
            WireError: the connection was closed early.
            TimeoutError: the deadline passed.
        """
        for piece in pieces(views):
            if len(piece) <= SCATTERED:
                self._fill_piece(piece, arrived)
            else:
                self._fill_scattered(piece, arrived)

    def _fill_piece(self, piece: list[memoryview], arrived: Callable[[memoryview], object] | None) -> None:
        began, size = time.monotonic(), sum(map(len, piece))
        whole = socket.MSG_WAITALL if self._quick else 0
        came, left = self._reader.take(piece), piece
        while True:
            there, left = _split(left, came)
            if arrived is not None:
                for view in there:
                    arrived(view)
            now = time.monotonic()
            if not left:
                if arrived is not None:  # it is data: what is small comes with what is before it
                    self._quick = size >= _QUICK * (now - began)
                return
            if now - self._checked > _CHECK:  # two system calls for each piece would be felt
                set_timeout(self._sock, self._deadline)
                self._checked = now
            try:
                came = self._sock.recvmsg_into(left, 0, whole)[0]
            except BlockingIOError as e:
                raise TimeoutError(f"not all data came within {self._deadline.timeout:g}s") from e
            if not came:
                raise WireError("the connection was closed in the middle of the data")

    def _fill_scattered(self, piece: list[memoryview], arrived: Callable[[memoryview], object] | None) -> None:
        """Many small views: received together, then handed out."""
        if self._bounce is None:
            self._bounce = memoryview(bytearray(PIECE))
        data = self._bounce[: sum(map(len, piece))]
        self._fill_piece([data], arrived)
        scatter(data, piece)


def pieces(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes, ``PIECE`` at a time, wherever one view ends and the next begins."""
    piece: list[memoryview] = []
    room = PIECE
    for view in views:
        rest = view
        while len(rest) >= room:
            yield [*piece, rest[:room]]
            rest = rest[room:]
            piece, room = [], PIECE
        if len(rest):
            piece.append(rest)
            room -= len(rest)
    if piece:
        yield piece


def scatter(data: memoryview, views: Sequence[memoryview]) -> None:
    """Copies bytes into as many of several views."""
    for view in views:
        view[:] = data[: len(view)]
        data = data[len(view) :]


def _split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``count`` bytes, and the rest."""
    for i, view in enumerate(views):
        if count < len(view):
            begun = [view[:count]] if count else []
            return views[:i] + begun, [view[count:], *views[i + 1 :]]
        count -= len(view)
    return views, []


_RANGE = re.compile(r"bytes=([0-9]{1,19})-([0-9]{1,19})?")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")


def parse_range(text: str, total: int) -> tuple[int, int] | None:
    """``bytes=first-last`` as (first, end), cut to ``total``; None if it cannot be satisfied or is not of this form."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    start = int(match[1])
    stop = min(total, int(match[2]) + 1) if match[2] else total
    return (start, stop) if start < stop else None


def content_range(text: str) -> tuple[int, int] | None:
    """``bytes first-last/total`` as (first, end)."""
    match = _CONTENT_RANGE.fullmatch(text)
    return (int(match[1]), int(match[2]) + 1) if match else None


_INDICES = re.compile(r"[0-9]{1,11}(,[0-9]{1,11}){0,15}")


def parse_indices(text: str) -> list[int] | None:
    """Indices of chunks with commas between, ascending, at most ``MAX_SAMPLE``, or nothing; None if they are not."""
    if not text:
        return []
    if not _INDICES.fullmatch(text):
        return None
    indices = [int(word) for word in text.split(",")]
    return indices if all(a < b for a, b in itertools.pairwise(indices)) else None
