"""The wire form of a state that is sent over a process group.

Five kinds of messages, each one ``send`` of a ``uint8`` tensor, from the source to one receiver, and two back:

    1. the *prologue*, ``PROLOGUE_BYTES``: magic, version, step, bytes of the manifest, bytes of data, sizes of
       chunks and buckets, whether the source waits for the receiver, bytes of the next message;
    2. if there are any, the *way*: an address for processes of the same machine, what to say there
       (:mod:`torchft.checkpointing.pg_local`). The receiver answers with one byte, :data:`LOCALLY`: all else comes
       there, or :data:`BY_GROUP`: it goes on here;
    3. the manifest's body; if the source waits, the receiver answers with one byte when it has announced messages;
    4. the data in *buckets* (:func:`buckets`, computed alike on both sides);
    5. the *trailer*: the root, then the xxh3-128 of each chunk.

Or the source cannot give the state: a prologue that announces no manifest, and as its data the *reason*, one message.

Invariants
    - The sizes of all messages follow from the prologue and the manifest, and are bounded before memory is allocated.
    - A sender of something else is noticed at the prologue.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from torchft.checkpointing.chunks import CHUNK_SIZE, DIGEST_BYTES
from torchft.checkpointing.manifest import MAX_MANIFEST_BYTES
from torchft.checkpointing.transport import ManifestError

__all__ = [
    "ANNOUNCED",
    "BUCKET",
    "BY_GROUP",
    "DEVICE_BUCKET",
    "LOCALLY",
    "MAX_REASON",
    "PROLOGUE_BYTES",
    "Bucket",
    "ChunkHasher",
    "Prologue",
    "buckets",
]

_MAGIC = b"TORCHFT\x01"
_VERSION = 3
_FORMAT = struct.Struct("<8sIqQQQQ?H")
PROLOGUE_BYTES = 64
ANNOUNCED, LOCALLY, BY_GROUP = 1, 2, 3
"""What a receiver answers: messages are announced; the local way is taken, or is not."""
BUCKET = 4 << 20
"""Most bytes of one message between hosts. Small enough to be in the cache still when it is sent after it was hashed,
and hashed after it came; large enough that a message's own cost does not matter: to announce one takes a system call
here and another there, some ten microseconds each."""
DEVICE_BUCKET = 32 << 20
"""The same where messages go from device to device: each costs more there, and the cache has no part in it."""
MAX_REASON = 1000
"""Bytes of why a state is not given."""
_DIRECT = 1 << 20
_MAX_BUCKET = 64 << 20
_MAX_WAY = 256
_MAX_TOTAL = 1 << 50


@dataclass(frozen=True, slots=True)
class Prologue:
    """What comes."""

    step: int
    body: int
    """Bytes of the manifest; 0: the state is not given, and the data says why."""
    total: int
    """Bytes of data."""
    bucket: int = BUCKET
    """Most bytes of one message of data."""
    waits: bool = True
    """The source sends no data before the receiver has announced messages. Not between devices: there what a member
    does happens in order, and a byte that goes back would wait behind the data that waits for it."""
    way: int = 0
    """Bytes of the offer of a local way; 0: there is none."""

    def pack(self) -> bytes:
        numbers = (self.step, self.body, self.total, CHUNK_SIZE, self.bucket, self.waits, self.way)
        return _FORMAT.pack(_MAGIC, _VERSION, *numbers).ljust(PROLOGUE_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Prologue:
        """Reads and checks a prologue.

        Raises:
            ManifestError: it is not one, or announces what this side does not accept.
        """
        magic, version, step, body, total, chunk_size, bucket, waits, way = _FORMAT.unpack_from(data)
        if magic != _MAGIC:
            raise ManifestError(
                f"what arrives is not a torchft checkpoint (it begins {data[:8].hex()}): the source uses another "
                "transport or another package. Give all replica groups the same"
            )
        if version != _VERSION or chunk_size != CHUNK_SIZE:
            raise ManifestError(
                f"the source sends version {version} of the format with chunks of {chunk_size} bytes, this side "
                f"reads version {_VERSION} with {CHUNK_SIZE}: run the same torchft on both sides"
            )
        most = _MAX_TOTAL if body else MAX_REASON
        if step < 0 or body > MAX_MANIFEST_BYTES or total > most or not body + total:
            raise ManifestError(f"the source announces a manifest of {body} bytes and {total} bytes of data")
        if not _DIRECT <= bucket <= _MAX_BUCKET:
            raise ManifestError(f"the source announces messages of {bucket} bytes")
        if way > _MAX_WAY:
            raise ManifestError(f"the source announces {way} bytes of an address")
        return cls(step, body, total, bucket, waits, way)

    @property
    def trailer(self) -> int:
        """Bytes of the trailer."""
        return DIGEST_BYTES * (1 + -(-self.total // CHUNK_SIZE))


@dataclass(frozen=True, slots=True)
class Bucket:
    """One message of data."""

    start: int
    stop: int
    extent: int
    """The extent that it is a part of, sent from and received into its memory; -1: several, gathered in a buffer."""
    offset: int
    """Bytes into that extent."""


def buckets(extents: Sequence[int], size: int = BUCKET) -> Iterator[Bucket]:
    """Cuts the data: large extents into parts of themselves, runs of small ones gathered.

    Args:
        extents: of the manifest.
        size: most bytes of one message.
    """
    gathered = 0
    position = 0
    for extent, length in enumerate(extents):
        if length < _DIRECT and gathered + length <= size:
            gathered += length
            position += length
            continue
        if gathered:
            yield Bucket(position - gathered, position, -1, 0)
            gathered = 0
        if length < _DIRECT:
            gathered = length
        else:
            for at in range(0, length, size):
                stop = min(length, at + size)
                yield Bucket(position + at, position + stop, extent, at)
        position += length
    if gathered:
        yield Bucket(position - gathered, position, -1, 0)


class ChunkHasher:
    """Hashes data that comes in any portions, in order, chunk by chunk."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self._room = CHUNK_SIZE
        self._digests: list[bytes] = []

    def update(self, views: Sequence[memoryview]) -> None:
        for whole in views:
            view = whole
            while len(view):
                part = view[: self._room]
                self._state.update(part)
                self._room -= len(part)
                view = view[len(part) :]
                if not self._room:
                    self._close()

    def _close(self) -> None:
        self._digests.append(self._state.digest())
        self._state = xxhash.xxh3_128()
        self._room = CHUNK_SIZE

    def finish(self) -> bytes:
        """The digests of all chunks, one after another."""
        if self._room != CHUNK_SIZE:
            self._close()
        return b"".join(itertools.chain(self._digests))
