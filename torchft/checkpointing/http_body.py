"""What a source answers a request for data with: bytes of a snapshot, or the loan of the memory where they are.

Rules
    - Bytes go out of the snapshot's memory in pieces that stay in the cache between hashing and sending.
    - No call on the socket takes longer than its last ``limit_calls`` while a lease is held, so that the memory can be
      had back. While a reader copies what was lent, none is held (:mod:`torchft.checkpointing.http_lent`).
"""

from __future__ import annotations

import socket
import time

import xxhash

from torchft.checkpointing.chunks import DIGEST_BYTES
from torchft.checkpointing.http_lent import AHEAD, MAX_SPANS, TAKEN, write_spans
from torchft.checkpointing.http_wire import PIECE, HeadReader, WireError, send_some, send_views
from torchft.checkpointing.offer import Offer, Reader

__all__ = ["Body", "LentBody"]


class Body:
    """Sends a range of an offer's data.

    Args:
        sock: to whom.
        reader: who that is.
        offer: whose data.
        stall: seconds after which a reader that takes nothing is given up.
    """

    def __init__(self, sock: socket.socket, reader: Reader, offer: Offer, stall: float) -> None:
        self._sock = sock
        self._reader = reader
        self._offer = offer
        self._stall = stall
        self._tail = b""

    def send(self, start: int, stop: int, hashed: bool) -> None:
        """Sends these bytes; ``hashed``: they are whole chunks, and the hash of each follows it.

        Raises:
            OSError: the connection ended.
            TimeoutError: the reader takes nothing, or the bytes were not copied in time.
            Withdrawn: the data is not to be read any more.
            Gone: part of it is not there any more.
        """
        size = self._offer.cut.chunk_size
        while start < stop:
            index = start // size
            end = min(stop, (index + 1) * size)
            known = self._offer.digest_of(index) if hashed else None
            hasher = xxhash.xxh3_128() if hashed and known is None else None
            while start < end:
                there = self._offer.await_bytes(start + 1, self._stall, self._reader)
                until = min(end, start + PIECE, there)
                self._piece(start, until, hasher)
                start = until
            if hashed:
                if hasher is not None:
                    known = hasher.digest()
                    self._offer.hashed(index, known)
                assert known is not None
                self._tail = known
                self._offer.sent(self._reader, index)
        if self._tail:
            send_views(self._sock, [memoryview(self._tail)], self._stall)

    def _piece(self, start: int, stop: int, hasher: xxhash.xxh3_128 | None) -> None:
        """Sends bytes of one chunk, after the hash of the chunk before, hashing them first."""
        moved_on = time.monotonic()
        fresh = True
        while start < stop:
            with self._offer.reading(self._reader.lease, start, stop) as views:
                if fresh and hasher is not None:
                    for view in views:
                        hasher.update(view)
                fresh = False
                tail = len(self._tail)
                sent = send_some(self._sock, [memoryview(self._tail), *views] if tail else views)
            if sent:
                self._tail = self._tail[sent:]
                start += max(0, sent - tail)
            elif time.monotonic() - moved_on > self._stall:
                raise TimeoutError("the reader takes nothing")
            else:
                self._offer.await_bytes(start, None, self._reader)  # ends with the offer
                continue
            if start < stop:
                moved_on = time.monotonic()


class LentBody:
    """Lends a range of an offer's data, whole chunks, to a reader of this machine and user.

    Args:
        sock: to whom.
        reader: who that is.
        heads: of that connection, with what it sent beyond its request.
        offer: whose data.
        stall: seconds after which a reader that takes nothing is given up.
        first: index of a chunk.
        stop: end, beyond it.
    """

    def __init__(
        self, sock: socket.socket, reader: Reader, heads: HeadReader, offer: Offer, stall: float, first: int, stop: int
    ) -> None:
        self._sock = sock
        self._reader = reader
        self._heads = heads
        self._offer = offer
        self._stall = stall
        self._first = first
        self._stop = stop
        start, end = offer.cut.span(first)[0], offer.cut.span(stop - 1)[1]
        offer.await_bytes(start + 1, stall, reader)  # before that it may not be known where they will be
        self._spans = b""
        if offer.pieces(start, end) <= MAX_SPANS:
            with offer.reading(reader.lease, start, end) as views:
                self._spans = write_spans(views)

    @property
    def possible(self) -> bool:
        """Whether the memory is in few enough places to be named."""
        return bool(self._spans)

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self._spans) + DIGEST_BYTES * (self._stop - self._first)

    def send(self) -> None:
        """Sends it, and hears what the reader has taken. Raises as :meth:`Body.send` does."""
        said = memoryview(self._spans)
        for index in range(self._first, self._stop):
            value = self._offer.hash_of(index, self._reader, self._stall)
            send_views(self._sock, [said, memoryview(value)], self._stall)
            said = said[:0]
            if index - AHEAD >= self._first:
                self._hear(index - AHEAD)
        for index in range(max(self._first, self._stop - AHEAD), self._stop):
            self._hear(index)

    def _hear(self, index: int) -> None:
        """Waits until the reader says what has become of a chunk."""
        answer = memoryview(bytearray(1))
        moved_on = time.monotonic()
        while not self._heads.take([answer]):
            try:
                if not self._sock.recv_into(answer):
                    raise WireError("the reader closed the connection while it was lent memory")
                break
            except BlockingIOError:
                if time.monotonic() - moved_on > self._stall:
                    raise TimeoutError("the reader takes nothing") from None
                self._offer.await_bytes(0, None, self._reader)  # ends with the offer
        if answer == TAKEN:
            self._offer.sent(self._reader, index)
