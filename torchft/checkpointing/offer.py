"""One snapshot as others read it: its bytes, in order, while they are copied; a chunk's hash once somebody wants it.

States: *open* (anybody may become a reader) → *withdrawn* (nobody may read; every wait here ends with
:class:`Withdrawn`). Only forward.

Rules
    - A chunk is hashed as it is sent, just before, while it is in the cache; all others only when somebody asks for
      their hashes. An offer that nobody reads costs nothing.
    - Whoever reads the memory holds its own *lease* for a moment, a chunk at most. :meth:`move` copies what readers
      still need to memory of the offer's own, puts the copy in place, and sees each lease free once: then the live
      memory is read no more.
    - A reader that has asked for hashes alone only *compares*: nothing is copied for it, and nobody waits for it.
    - What was not copied, because it had been sent to everybody who reads, is *gone*: asked for again, it is refused.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torchft.checkpointing.chunks import ByteRun, Cut, Seal, digest, write_hashes, write_manifest, write_sample
from torchft.checkpointing.manifest import Manifest
from torchft.runtime.deadline import Deadline

__all__ = ["Gone", "Offer", "Reader", "Withdrawn"]


class Withdrawn(Exception):
    """The snapshot is not to be read any more."""


class Gone(Exception):
    """This part of the snapshot is not there any more."""


class Reader(Protocol):
    """A connection that reads the snapshot."""

    dropped: bool
    """It was cut: what it waits for does not matter any more."""
    comparing: bool
    """It has asked for hashes alone, so far: it needs no chunk."""
    receiver: str
    """Whose it is: a receiver may have several."""
    lease: threading.Lock
    """Held by it while it reads the snapshot's memory."""

    def cut(self) -> None:
        """Makes it stop reading, soon."""

    def gone(self) -> bool:
        """Whether the receiver has closed it."""


class Offer:
    """What a server holds of one snapshot.

    Args:
        step: of the state.
        manifest: of the state.
        changed: the server's condition; guards all fields, notified when any changes.
    """

    def __init__(self, step: int, manifest: Manifest, changed: threading.Condition) -> None:
        self.step = step
        self.name = secrets.token_hex(8)
        """The step may be offered once more, with another state: answers tell which offer they are of."""
        self.cut = Cut.shared(manifest.total)
        self.document = write_manifest(step, manifest)
        self.withdrawn = False
        self.readers: set[Reader] = set()
        self.seal: Seal | None = None
        self.hashes = b""
        self._body = digest([memoryview(manifest.body)])
        self._changed = changed
        self._ready = 0
        self._digests: list[bytes | None] = [None] * self.cut.count
        self._unhashed = self.cut.count
        self._all = (1 << self.cut.count) - 1
        self._sent: dict[str, int] = {}  # a bit for each chunk: there may be a thousand receivers of many chunks
        self._held: tuple[ByteRun, frozenset[int] | None] = (
            ByteRun([]),
            None,
        )  # and the chunks that are there; None: all
        self._sealer: threading.Thread | None = None
        self._sealing = threading.Lock()  # the sealer's lease
        self._incomplete = False
        self.bytes_sent = 0
        if not self.cut.count:
            with changed:
                self._finish_seal()

    # ------------------------------------------------------------ the bytes

    def supply(self, run: ByteRun) -> None:
        """The data, or memory that it is being copied into. Nothing of it is read before ``advance`` says so."""
        self._held = run, None

    def advance(self, ready: int) -> None:
        """The data is there up to this byte."""
        with self._changed:
            self._ready = ready
            self._changed.notify_all()

    def await_bytes(self, stop: int, limit: float | None = None, reader: Reader | None = None) -> int:
        """Returns when the data is there up to ``stop``: up to where it is.

        Raises:
            Withdrawn: it will not be, or ``reader`` was dropped.
            TimeoutError: it was not within ``limit`` seconds.
        """
        if self._ready >= stop and not self._lost(reader):
            return self._ready
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready >= stop or self._lost(reader), limit):
                raise TimeoutError(f"byte {stop} of the snapshot was not copied within {limit:g}s")
            self._check(reader)
            return self._ready

    @contextmanager
    def reading(self, lease: threading.Lock, start: int, stop: int) -> Iterator[list[memoryview]]:
        """Bytes of one chunk, to be read inside and not afterwards.

        Raises:
            Gone: they are not there any more.
        """
        with lease:
            run, there = self._held
            if there is not None and start // self.cut.chunk_size not in there:
                raise Gone(f"chunk {start // self.cut.chunk_size} of step {self.step} is not held any more")
            yield run.views(start, stop)

    def pieces(self, start: int, stop: int) -> int:
        """In how many places of memory these bytes are; there are some."""
        return self._held[0].pieces(start, stop)

    def check_held(self, first: int, stop: int) -> None:
        """
        Raises:
            Gone: one of these chunks is not there any more.
        """
        there = self._held[1]
        if there is not None and not there.issuperset(range(first, stop)):
            raise Gone(f"chunks {first} to {stop - 1} of step {self.step} are not all held any more")

    def sent(self, reader: Reader, index: int) -> None:
        """A reader was sent a whole chunk."""
        with self._changed:
            self._sent[reader.receiver] = self._sent.get(reader.receiver, 0) | 1 << index
            self.bytes_sent += self.cut.length(index)

    def was_sent(self, receiver: str) -> bool:
        """Whether a receiver was sent every chunk."""
        with self._changed:
            return self._sent.get(receiver, 0) == self._all

    @property
    def wanted(self) -> bool:
        """Whether somebody reads it who does not only compare."""
        return any(not r.comparing for r in self.readers)

    def needed(self) -> set[int]:
        """Chunks that somebody who reads was not sent."""
        missing = 0
        with self._changed:
            for receiver in {r.receiver for r in self.readers if not r.dropped and not r.comparing}:
                missing |= self._all & ~self._sent.get(receiver, 0)
        return {index for index, bit in enumerate(reversed(f"{missing:b}")) if bit == "1"}

    def move(self, memory: ByteRun, copy: Callable[[ByteRun, ByteRun, list[tuple[int, int]]], None]) -> int:
        """Copies what readers need into ``memory``: afterwards nobody reads the memory that was offered.

        Args:
            memory: as large as the data.
            copy: told from where, to where, and which bytes.

        Returns:
            How many bytes were copied.
        """
        there: set[int] = set()
        share = max(8, self.cut.count // 64)
        while ahead := sorted(self.needed() - there)[:share]:  # fewer and fewer, as readers read on or go
            copy(self._held[0], memory, [self.cut.span(i) for i in ahead])
            there.update(ahead)
        with self._changed:
            self._held = memory, frozenset(there)
            leases = [r.lease for r in self.readers] + [self._sealing]
        for lease in leases:  # who began to read the old memory has ended when its lease was free once
            with lease:
                pass
        return sum(stop - start for start, stop in map(self.cut.span, there))

    # ----------------------------------------------------------- the hashes

    def digest_of(self, index: int) -> bytes | None:
        """A chunk's hash, if it is known."""
        return self._digests[index]

    def hash_of(self, index: int, reader: Reader, limit: float) -> bytes:
        """A chunk's hash, made now if nobody has made it.

        Args:
            index: of the chunk.
            reader: who wants it.
            limit: seconds that its bytes may take to be there.

        Raises:
            Withdrawn: they will not be, or ``reader`` was dropped.
            Gone: they are not there any more.
            TimeoutError: they were not in time.
        """
        return self._hash(index, reader.lease, limit, reader)

    def hashed(self, index: int, value: bytes) -> None:
        """A chunk's hash is known."""
        with self._changed:
            if self._digests[index] is None:
                self._digests[index] = value
                self._unhashed -= 1
                if not self._unhashed:
                    self._finish_seal()

    def sample(self, indices: Sequence[int], deadline: Deadline, reader: Reader) -> bytes:
        """The hashes of some chunks, as a document. Those are hashed which nobody has hashed yet.

        Args:
            indices: ascending; those beyond the last chunk are passed over.
            deadline: until when the bytes must be there.
            reader: who asks.

        Raises:
            Withdrawn: they will not be, or ``reader`` was dropped, or has gone.
            Gone: they cannot be hashed any more.
            TimeoutError: the deadline passed.
        """
        chunks: list[bytes] = []
        for index in indices:
            if index >= self.cut.count:
                break
            if self._digests[index] is None and reader.gone():
                raise Withdrawn("who wanted to compare has gone")
            chunks.append(self.hash_of(index, reader, deadline.remaining()))
        return write_sample(self.step, self.cut, self._body, chunks)

    def await_seal(self, deadline: Deadline, reader: Reader | None = None) -> Seal | None:
        """The hashes of all chunks, or None if they were not there before the deadline. Hashes what nobody has yet.

        Raises:
            Withdrawn: they will not be, or ``reader`` was dropped.
            Gone: they cannot be made any more.
        """
        with self._changed:
            if self.seal is None and self._sealer is None and not self._lost(reader):
                self._sealer = threading.Thread(target=self._hash_the_rest, name="torchft-http-hash", daemon=True)
                self._sealer.start()
            self._changed.wait_for(
                lambda: self.seal is not None or self._incomplete or self._lost(reader), deadline.remaining()
            )
            self._check(reader)
            if self._incomplete:
                raise Gone(f"not all of step {self.step} was hashed while it was held")
            return self.seal

    @property
    def hashing(self) -> bool:
        """Whether a thread hashes it."""
        return self._sealer is not None

    def _hash_the_rest(self) -> None:
        try:
            for index in range(self.cut.count):
                self._hash(index, self._sealing)
        except Withdrawn:
            pass  # nobody wants the hashes any more
        except Gone:
            self._incomplete = True
        finally:
            with self._changed:
                self._sealer = None
                self._changed.notify_all()

    def _hash(
        self, index: int, lease: threading.Lock, limit: float | None = None, reader: Reader | None = None
    ) -> bytes:
        """A chunk's hash, made now if nobody has made it."""
        value = self._digests[index]
        if value is None:
            start, stop = self.cut.span(index)
            self.await_bytes(stop, limit, reader)
            with self.reading(lease, start, stop) as views:
                value = digest(views)
            self.hashed(index, value)
        return value

    def _finish_seal(self) -> None:
        seal = Seal(self.cut, b"".join(d for d in self._digests if d is not None), self._body)
        self.seal, self.hashes = seal, write_hashes(self.step, seal)
        self._changed.notify_all()

    def _lost(self, reader: Reader | None) -> bool:
        return self.withdrawn or (reader is not None and reader.dropped)

    def _check(self, reader: Reader | None) -> None:
        if self.withdrawn:
            raise Withdrawn(f"the snapshot of step {self.step} was withdrawn")
        if self._lost(reader):
            raise Withdrawn("this reader was dropped")
