"""One snapshot as others read it: its bytes, in order, while they are copied; a chunk's hash once somebody wants it.

States: *open* (anybody may become a reader) → *closed* (those who are readers may finish) → *withdrawn* (nobody may
read; every wait here ends with :class:`Withdrawn`). Only forward.

Rules
    - A chunk is hashed as it is sent, just before, while it is in the cache; all others only when somebody asks for
      the whole table. An offer that nobody reads costs nothing.
    - Whoever reads the memory holds its own *lease* for a moment. :meth:`move` copies what readers still need to
      memory of the offer's own, takes all leases, and puts the copy in place: then the live memory is read no more.
    - What was not copied, because it had been sent to everybody who reads, is *gone*: asked for again, it is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torchft.checkpointing.chunks import ByteRun, Cut, Seal, digest, write_hashes, write_manifest
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
        run: its data, or memory that it is being copied into.
        changed: the server's condition; guards all fields, notified when any changes.
    """

    def __init__(self, step: int, manifest: Manifest, run: ByteRun, changed: threading.Condition) -> None:
        self.step = step
        self.cut = Cut(manifest.total)
        self.document = write_manifest(step, manifest)
        self.open = True
        self.withdrawn = False
        self.readers: set[Reader] = set()
        self.seal: Seal | None = None
        self.hashes = b""
        self._run = run
        self._manifest = manifest
        self._changed = changed
        self._ready = 0
        self._digests: list[bytes | None] = [None] * self.cut.count
        self._unhashed = self.cut.count
        self._sent: dict[str, set[int]] = {}
        self._there: frozenset[int] | None = None  # None: all of it
        self._sealer: threading.Thread | None = None
        self._sealing = threading.Lock()  # the sealer's lease
        self._incomplete = False
        self.bytes_sent = 0
        if not self.cut.count:
            with changed:
                self._finish_seal()

    # ------------------------------------------------------------ the bytes

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
            there = self._there
            if there is not None and start // self.cut.chunk_size not in there:
                raise Gone(f"chunk {start // self.cut.chunk_size} of step {self.step} is not held any more")
            yield self._run.views(start, stop)

    def check_held(self, first: int, stop: int) -> None:
        """
        Raises:
            Gone: one of these chunks is not there any more.
        """
        there = self._there
        if there is not None and not there.issuperset(range(first, stop)):
            raise Gone(f"chunks {first} to {stop - 1} of step {self.step} are not all held any more")

    def sent(self, reader: Reader, index: int) -> None:
        """A reader was sent a whole chunk."""
        with self._changed:
            self._sent.setdefault(reader.receiver, set()).add(index)
            self.bytes_sent += self.cut.length(index)

    def was_sent(self, receiver: str) -> bool:
        """Whether a receiver was sent every chunk."""
        with self._changed:
            return len(self._sent.get(receiver, ())) == self.cut.count

    def needed(self) -> set[int]:
        """Chunks that somebody who reads was not sent."""
        with self._changed:
            out: set[int] = set()
            for receiver in {r.receiver for r in self.readers if not r.dropped}:
                out |= set(range(self.cut.count)) - self._sent.get(receiver, set())
            return out

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
            copy(self._run, memory, [self.cut.span(i) for i in ahead])
            there.update(ahead)
        with self._changed:
            leases = [r.lease for r in self.readers] + [self._sealing]
        for lease in leases:
            lease.acquire()
        try:
            self._run, self._there = memory, frozenset(there)
        finally:
            for lease in leases:
                lease.release()
        return sum(stop - start for start, stop in map(self.cut.span, there))

    # ----------------------------------------------------------- the hashes

    def digest_of(self, index: int) -> bytes | None:
        """A chunk's hash, if it is known."""
        return self._digests[index]

    def hashed(self, index: int, value: bytes) -> None:
        """A chunk's hash is known."""
        with self._changed:
            if self._digests[index] is None:
                self._digests[index] = value
                self._unhashed -= 1
                if not self._unhashed:
                    self._finish_seal()

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
                if self._digests[index] is not None:
                    continue
                start, stop = self.cut.span(index)
                self.await_bytes(stop)
                with self.reading(self._sealing, start, stop) as views:
                    value = digest(views)
                self.hashed(index, value)
        except Withdrawn:
            pass  # nobody wants the hashes any more
        except Gone:
            self._incomplete = True
        finally:
            with self._changed:
                self._sealer = None
                self._changed.notify_all()

    def _finish_seal(self) -> None:
        seal = Seal.of(self._manifest, b"".join(d for d in self._digests if d is not None))
        self.seal, self.hashes = seal, write_hashes(self.step, seal)
        self._changed.notify_all()

    def _lost(self, reader: Reader | None) -> bool:
        return self.withdrawn or (reader is not None and reader.dropped)

    def _check(self, reader: Reader | None) -> None:
        if self.withdrawn:
            raise Withdrawn(f"the snapshot of step {self.step} was withdrawn")
        if self._lost(reader):
            raise Withdrawn("this reader was dropped")
