"""The little of HTTP/1.1 that both ends of the transport need: heads, ranges, and bodies straight to and from memory.

Rules
    - A head is at most ``MAX_HEAD`` bytes and ``MAX_HEADERS`` lines; header names are lower case once read.
    - Bodies always have a ``Content-Length``; nothing is chunked or compressed.
    - Sockets are blocking; every call on one is bounded by the last :func:`set_timeout`.
    - Data is sent from and received into lists of ``memoryview`` (``sendmsg``, ``recvmsg_into``): no copy in Python.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable, Sequence

from torchft.runtime.deadline import Deadline

__all__ = ["HeadReader", "WireError", "content_range", "parse_range", "recv_into_views", "send_views", "set_timeout"]

MAX_HEAD = 16 << 10
MAX_HEADERS = 64
_TIMEVAL = struct.Struct("@ll")
_IOV = 256
_RECV = 1048576
_SEND = 4 << 20


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
    limit = _TIMEVAL.pack(int(left), max(1, int(left % 1 * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def send_views(sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Sends all bytes.

    Raises:
        TimeoutError: the other end took nothing for as long as the last :func:`set_timeout` allows.
    """
    pending = [v for v in views if len(v)]
    i = 0
    while i < len(pending):
        batch, size = [], 0
        for view in pending[i : i + _IOV]:
            batch.append(view[: _SEND - size])
            size += len(batch[-1])
            if size >= _SEND:
                break
        try:
            sent = sock.sendmsg(batch)
        except BlockingIOError as e:
            raise TimeoutError("the other end takes nothing") from e
        while i < len(pending) and sent >= len(pending[i]):
            sent -= len(pending[i])
            i += 1
        if sent:
            pending[i] = pending[i][sent:]


def recv_into_views(
    sock: socket.socket,
    reader: HeadReader,
    views: Sequence[memoryview],
    deadline: Deadline,
    arrived: Callable[[memoryview], None] | None = None,
) -> None:
    """Fills all views with the bytes that follow a head.

    Args:
        sock: where from.
        reader: the reader of the head; it may hold the first bytes.
        views: where to.
        deadline: until when.
        arrived: told each run of bytes right after it was written, while it is in the cache.

    Raises:
        WireError: the connection was closed early.
        TimeoutError: the deadline passed.
    """
    pending = [v for v in views if len(v)]
    got = reader.take(pending)
    i = 0
    while True:
        while got:
            view = pending[i]
            part = min(got, len(view))
            if arrived is not None:
                arrived(view[:part])
            got -= part
            if part == len(view):
                i += 1
            else:
                pending[i] = view[part:]
        if i == len(pending):
            return
        set_timeout(sock, deadline)
        try:
            if len(pending[i]) >= _RECV or i + 1 == len(pending):
                got = sock.recv_into(pending[i], min(_RECV, len(pending[i])), socket.MSG_WAITALL)
            else:
                got = sock.recvmsg_into(pending[i : i + _IOV], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as e:
            raise TimeoutError(f"not all data came within {deadline.timeout:g}s") from e
        if not got:
            raise WireError("the connection was closed in the middle of the data")


_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{1,19})?")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


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
