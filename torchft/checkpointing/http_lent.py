"""Between two processes of one user on one machine: the receiver copies out of the source's memory itself.

The idea
    A byte that goes over a socket is copied twice, into the kernel and out of it, and each time one of the processes
    has to run for it. The kernel can copy it once, from the source's memory into the receiver's
    (:mod:`torchft.runtime.cross_memory`). So a receiver on a Unix socket says that it would take the loan of the memory
    (``Prefer: lend``), and a source that sees its own user at the other end answers a request for data with the
    addresses of the bytes, and the hash of each chunk, instead of the bytes.

The body of such an answer (``application/x-torchft-lent``)
    Address and length, 8 bytes each, little-endian, of all runs of memory that the range is made of, in order; then the
    16 bytes of each chunk's hash, as it is made. The reader answers each hash with a byte on the same connection:
    ``TAKEN``, the chunk is there and has this hash; ``NOT_TAKEN``, it is not.

Rules
    - The source never waits for a reader to let go of its memory: it may write, move or free it at any time, and the
      connection's end is all that the reader hears of it. What was read has the announced hash, or is not what was
      offered: then, and where it cannot be read at all, the reader asks for the bytes as anybody else does, on the
      same connection, and what comes is judged by that.
    - A chunk counts as sent when it was taken. At most ``AHEAD`` further ones are hashed meanwhile: they are in a cache
      that the two share when the reader comes to them.
    - What a source says is its memory is read of the process that the kernel says is at the other end, of the same
      user, and of no other.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence

import xxhash

from torchft import config
from torchft.checkpointing.chunks import DIGEST_BYTES
from torchft.checkpointing.http_local import peer_process
from torchft.checkpointing.http_wire import PIECE, SCATTERED, pieces, scatter
from torchft.checkpointing.transport import ManifestError
from torchft.runtime.cross_memory import address_of, can_read_others, read_memory

logger = logging.getLogger("torchft.checkpointing.http_transport")

__all__ = [
    "ACCEPTED_SPANS",
    "AHEAD",
    "LENT",
    "MAX_SPANS",
    "NOT_TAKEN",
    "TAKEN",
    "Borrower",
    "Loan",
    "is_lent",
    "own_process",
    "tell_unreadable",
    "write_spans",
]

LENT = "application/x-torchft-lent"
TAKEN, NOT_TAKEN = b"\x01", b"\x00"
MAX_SPANS = 16384
"""Runs of memory in one answer: with more of them the bytes are sent. In 256 MiB so many have 16 KiB each."""
ACCEPTED_SPANS = 65536
"""The same that a receiver takes: another version of a source may lend more."""
AHEAD = 1
"""Chunks that a source hashes while the reader copies the one before."""
_SPAN = struct.Struct("<QQ")
_told: set[int | None] = {errno.ESRCH}  # that the source has ended is told by the connection


def tell_unreadable(error: OSError) -> None:
    """Says, once for each reason, that this process does not get to other processes' memory."""
    if error.errno not in _told:
        _told.add(error.errno)
        logger.info(
            "a source's memory on this machine cannot be read (%s%s): its bytes come over a socket, which is slower",
            error.strerror,
            "; kernel.yama.ptrace_scope, or a sandbox, forbids it" if error.errno == errno.EPERM else "",
        )


def write_spans(views: Sequence[memoryview]) -> bytes:
    """Where these bytes are in this process's memory."""
    return b"".join(_SPAN.pack(address_of(view), len(view)) for view in views)


def is_lent(length: int, chunks: int) -> bool:
    """Whether a body of so many bytes may be the loan of so many chunks."""
    spans, rest = divmod(length - DIGEST_BYTES * chunks, _SPAN.size)
    return not rest and 0 < spans <= ACCEPTED_SPANS


def own_process(sock: socket.socket) -> int | None:
    """Which process is at the other end of a connection, if it is one of this machine and user: it may be told where
    this process's memory is, and may tell.
    """
    peer = peer_process(sock)
    return peer[0] if peer is not None and peer[1] == os.geteuid() else None


class Loan:
    """Memory of another process, to be read from its beginning to its end.

    Args:
        data: what :func:`write_spans` made.
        total: bytes that it is to have.

    Raises:
        ManifestError: it has not.
    """

    def __init__(self, data: bytes | bytearray, total: int) -> None:
        self._spans = list(_SPAN.iter_unpack(data))
        self._next = 0
        lengths = [length for _, length in self._spans]
        if sum(lengths) != total or not all(lengths):
            raise ManifestError(f"the source lends {len(lengths)} runs of memory that are not the {total} bytes wanted")

    def take(self, count: int) -> list[tuple[int, int]]:
        """Address and length of each run of the next so many bytes; there are so many."""
        taken: list[tuple[int, int]] = []
        while count:
            address, length = self._spans[self._next]
            part = min(count, length)
            taken.append((address, part))
            count -= part
            if part < length:
                self._spans[self._next] = address + part, length - part
            else:
                self._next += 1
        return taken


class Borrower:
    """Copies out of the memory of the process at the other end of a connection.

    Args:
        pid: that process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._bounce: memoryview | None = None

    @classmethod
    def of(cls, sock: socket.socket) -> Borrower | None:
        """For a connection; None where that process is none of this machine and user, or there is no such way here."""
        pid = own_process(sock) if can_read_others() and config.CROSS_MEMORY.read() else None
        return None if pid is None else cls(pid)

    def copy(self, loan: Loan, into: Sequence[memoryview], arrived: Callable[[int], object]) -> bytes:
        """Copies the next bytes of a loan, and hashes them while they are in the cache.

        Args:
            loan: of that process.
            into: where to.
            arrived: told how many bytes each piece has that is there; what it raises ends the copying.

        Returns:
            The hash that they have.

        Raises:
            OSError: they cannot be read.
        """
        hasher = xxhash.xxh3_128()
        for piece in pieces(into):
            count = sum(map(len, piece))
            there = piece if len(piece) <= SCATTERED else [self._bouncing(count)]
            read_memory(self._pid, loan.take(count), there)
            for view in there:
                hasher.update(view)
            if there is not piece:
                scatter(there[0], piece)
            arrived(count)
        return hasher.digest()

    def _bouncing(self, count: int) -> memoryview:
        if self._bounce is None:
            self._bounce = memoryview(bytearray(PIECE))
        return self._bounce[:count]
