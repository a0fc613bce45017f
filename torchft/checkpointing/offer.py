"""One snapshot as it becomes readable: its bytes, in order, while they are copied; its hashes when all is hashed.

States: *open* (anybody may become a reader) → *closed* (those who are readers may finish) → *withdrawn* (nobody may
read; every wait here ends with :class:`Withdrawn`). Only forward.
"""

from __future__ import annotations

import threading
from typing import Protocol

from torchft.checkpointing.chunks import ByteRun, Seal, write_hashes, write_manifest
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.snapshot import seal_run
from torchft.runtime.deadline import Deadline

__all__ = ["Offer", "Reader", "Withdrawn"]


class Withdrawn(Exception):
    """The snapshot is not to be read any more."""


class Reader(Protocol):
    """Whoever reads the snapshot."""

    dropped: bool
    """It was cut: what it waits for does not matter any more."""

    def cut(self) -> None:
        """Makes it stop reading, soon."""


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
        self.run = run
        self.document = write_manifest(step, manifest)
        self.open = True
        self.withdrawn = False
        self.readers: set[Reader] = set()
        self.seal: Seal | None = None
        self.hashes = b""
        self._manifest = manifest
        self._changed = changed
        self._ready = 0

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
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready >= stop or self._lost(reader), limit):
                raise TimeoutError(f"byte {stop} of the snapshot was not copied within {limit:g}s")
            self._check(reader)
            return self._ready

    def await_seal(self, deadline: Deadline, reader: Reader | None = None) -> Seal | None:
        """The hashes, or None if they were not there before the deadline.

        Raises:
            Withdrawn: they will not be, or ``reader`` was dropped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.seal is not None or self._lost(reader), deadline.remaining())
            self._check(reader)
            return self.seal

    def _lost(self, reader: Reader | None) -> bool:
        return self.withdrawn or (reader is not None and reader.dropped)

    def _check(self, reader: Reader | None) -> None:
        if self.withdrawn:
            raise Withdrawn(f"the snapshot of step {self.step} was withdrawn")
        if self._lost(reader):
            raise Withdrawn("this reader was dropped")

    def make_seal(self) -> None:
        """Hashes the data as it becomes ready.

        Raises:
            Withdrawn: the snapshot was, meanwhile.
        """
        seal = seal_run(self._manifest, self.run, self.await_bytes)
        hashes = write_hashes(self.step, seal)
        with self._changed:
            self.seal, self.hashes = seal, hashes
            self._changed.notify_all()
