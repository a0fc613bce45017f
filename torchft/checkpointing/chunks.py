"""The data of a state as one run of bytes, cut into chunks that are hashed, and the root hash that names the state.

The idea
    The extents of a manifest, end to end, are the data. Byte ranges of it are read and written as lists of
    ``memoryview`` into tensor memory: nothing is copied in Python. The data is cut every ``chunk_size`` bytes, a small
    state so that there is a part for each of many sources (:meth:`Cut.shared`); each chunk has an xxh3-128. The *root*
    is the xxh3-128 of the manifest's and all chunks' hashes, so equal roots mean equal states: same tree, same layout,
    same bytes. (xxh3 finds corruption, not forgery.)

What a source serves beside the data, both JSON
    The *manifest document*, known before a byte is copied: a line ``{"format", "step", "total", "chunk_size", "body"}``
    and the manifest's body, whose hash ``body`` is. The *hashes*, known when everything is hashed: ``{"format", "step",
    "total", "chunk_size", "chunks", "body", "root"}``, ``chunks`` being base64 of 16 bytes each. A *sample* is the same
    of some chunks, and without a root: those that were asked for and that the state has, in order.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import itertools
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash

from torchft.checkpointing.manifest import MAX_TOTAL, Manifest
from torchft.checkpointing.transport import IntegrityError, ManifestError

__all__ = [
    "CHUNK_SIZE",
    "DIGEST_BYTES",
    "FORMAT",
    "ByteRun",
    "Cut",
    "Sample",
    "Seal",
    "digest",
    "host_view",
    "open_manifest",
    "parse_manifest",
    "read_hashes",
    "read_manifest",
    "read_sample",
    "write_hashes",
    "write_manifest",
    "write_sample",
]

FORMAT = "torchft-checkpoint/1"
CHUNK_SIZE = 8 << 20
DIGEST_BYTES = 16
_CHUNK_SIZES = range(64 << 10, (1 << 30) + 1)
_PARTS = 16
_SMALLEST = 1 << 20
_WHOLE = CHUNK_SIZE
"""Bytes up to which a state stays one chunk: parts cost more than they bring there, above all where many ask."""


def digest(views: Sequence[memoryview]) -> bytes:
    """The xxh3-128 of bytes that lie in several places."""
    state = xxhash.xxh3_128()
    for view in views:
        state.update(view)
    return state.digest()


def host_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional contiguous ``uint8`` CPU tensor, which it keeps alive."""
    return memoryview(cast(Any, tensor.numpy()))


class ByteRun:
    """Memory in several pieces, addressed as one run of bytes.

    Args:
        pieces: views of bytes, or one-dimensional contiguous ``uint8`` CPU tensors. They are kept alive.
    """

    def __init__(self, pieces: Sequence[torch.Tensor | memoryview]) -> None:
        self._pieces = [p if isinstance(p, memoryview) else host_view(p) for p in pieces]
        self._starts = list(itertools.accumulate((len(p) for p in self._pieces), initial=0))

    @property
    def total(self) -> int:
        return self._starts[-1]

    def pieces(self, start: int, stop: int) -> int:
        """In how many places of memory bytes ``start`` to ``stop`` are; there are some."""
        return bisect.bisect_left(self._starts, stop) - bisect.bisect_right(self._starts, start) + 1

    def views(self, start: int, stop: int) -> list[memoryview]:
        """Bytes ``start`` to ``stop``, in order.

        Raises:
            IndexError: they are not all there.
        """
        if not 0 <= start <= stop <= self.total:
            raise IndexError(f"bytes {start} to {stop} of {self.total}")
        out: list[memoryview] = []
        i = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            begin = self._starts[i]
            end = min(stop, self._starts[i + 1])
            out.append(self._pieces[i][start - begin : end - begin])
            start, i = end, i + 1
        return out


@dataclass(frozen=True, slots=True)
class Cut:
    """How data is cut into chunks."""

    total: int
    chunk_size: int = CHUNK_SIZE

    @classmethod
    def shared(cls, total: int) -> Cut:
        """For a state that comes from several sources: sixteen chunks, or more where these would be larger than
        ``CHUNK_SIZE``, fewer where they would be smaller than 1 MiB. A multiple of 64 KiB each, but for the last.
        One for a state of up to ``CHUNK_SIZE``.
        """
        if total <= _WHOLE:
            return cls(total)
        part = -(-total // _PARTS)
        step = _CHUNK_SIZES.start
        return cls(total, min(CHUNK_SIZE, max(_SMALLEST, -(-part // step) * step)))

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.total // self.chunk_size)

    def span(self, index: int) -> tuple[int, int]:
        """First byte and end of a chunk."""
        return index * self.chunk_size, min(self.total, (index + 1) * self.chunk_size)

    def length(self, index: int) -> int:
        """Bytes of a chunk."""
        first, stop = self.span(index)
        return stop - first


@dataclass(frozen=True, slots=True)
class Seal:
    """The hashes of a state."""

    cut: Cut
    chunks: bytes
    """The digest of each chunk, one after another."""
    body: bytes
    """The digest of the manifest's body."""

    @classmethod
    def of(cls, manifest: Manifest, chunks: bytes) -> Seal:
        """Of data that is cut every ``CHUNK_SIZE`` bytes."""
        return cls(Cut(manifest.total), chunks, digest([memoryview(manifest.body)]))

    @property
    def root(self) -> str:
        """Names the state; hexadecimal."""
        head = f"{FORMAT} {self.cut.total} {self.cut.chunk_size} ".encode()
        return xxhash.xxh3_128_hexdigest(head + self.body + self.chunks)

    def digest_of(self, index: int) -> bytes:
        return self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Sample:
    """The hashes of some chunks of a state."""

    cut: Cut
    body: bytes
    """The digest of the manifest's body."""
    chunks: Mapping[int, bytes]
    """Digests, by index."""

    def digest_of(self, index: int) -> bytes | None:
        return self.chunks.get(index)


def write_manifest(step: int, manifest: Manifest) -> bytes:
    """The manifest document."""
    body = digest([memoryview(manifest.body)])
    return _header(step, Cut.shared(manifest.total), body) + b"\n" + manifest.body


def read_manifest(document: bytes | bytearray, allow_pickle: bool = False) -> tuple[int, Manifest, Cut]:
    """Reads and checks a manifest document: step, manifest, how the data is cut.

    Raises:
        ManifestError: it is not such a document.
        IntegrityError: it does not have its own hash.
    """
    step, cut, body = open_manifest(document)
    return step, parse_manifest(body, cut, allow_pickle), cut


def open_manifest(document: bytes | bytearray) -> tuple[int, Cut, bytes]:
    """Reads a manifest document as far as its layout: step, how the data is cut, and the manifest's body as it is.

    Raises:
        ManifestError: it is not such a document.
        IntegrityError: it does not have its own hash.
    """
    line, _, body = bytes(document).partition(b"\n")
    _, step, cut, announced = _read_header(line)
    if announced != digest([memoryview(body)]):
        raise IntegrityError("the manifest does not have its own hash: it was damaged on the way")
    return step, cut, body


def parse_manifest(body: bytes, cut: Cut, allow_pickle: bool = False) -> Manifest:
    """Reads and checks a manifest's body.

    Raises:
        ManifestError: it is not a manifest, or not of such data.
    """
    manifest = Manifest.parse(body, allow_pickle)
    if manifest.total != cut.total:
        raise ManifestError(f"the manifest describes {manifest.total} bytes, its header announces {cut.total}")
    return manifest


def write_hashes(step: int, seal: Seal) -> bytes:
    """The hashes document."""
    chunks = base64.b64encode(seal.chunks).decode()
    return _header(step, seal.cut, seal.body, chunks=chunks, root=seal.root)


def read_hashes(document: bytes | bytearray) -> tuple[int, Seal]:
    """Reads and checks a hashes document.

    Raises:
        ManifestError: it is not such a document.
        IntegrityError: it does not have its own hash.
    """
    header, step, cut, body = _read_header(bytes(document))
    chunks = _read_chunks(header, cut.count)
    seal = Seal(cut, chunks, body)
    if seal.root != header.get("root"):
        raise IntegrityError("the chunk table does not have its own hash: it was damaged on the way")
    return step, seal


def write_sample(step: int, cut: Cut, body: bytes, chunks: Sequence[bytes]) -> bytes:
    """The sample document.

    Args:
        step: of the state.
        cut: how its data is cut.
        body: the digest of its manifest's body.
        chunks: the digests of the chunks that were asked for and that it has, in order.
    """
    return _header(step, cut, body, chunks=base64.b64encode(b"".join(chunks)).decode())


def read_sample(document: bytes | bytearray, indices: Sequence[int]) -> tuple[int, Sample]:
    """Reads and checks a sample document.

    Args:
        document: of a state that may be cut otherwise than the receiver's.
        indices: what was asked for.

    Raises:
        ManifestError: it is not such a document, or not what was asked for.
    """
    header, step, cut, body = _read_header(bytes(document))
    there = [i for i in indices if i < cut.count]
    chunks = _read_chunks(header, len(there))
    digests = (chunks[at : at + DIGEST_BYTES] for at in range(0, len(chunks), DIGEST_BYTES))
    return step, Sample(cut, body, dict(zip(there, digests, strict=True)))


def _read_chunks(header: dict[str, object], count: int) -> bytes:
    try:
        chunks = base64.b64decode(str(header.get("chunks")), validate=True)
    except (binascii.Error, ValueError) as e:
        raise ManifestError(f"the chunk table is not readable: {e}") from e
    if len(chunks) != count * DIGEST_BYTES:
        raise ManifestError("the chunk table does not cover the data")
    return chunks


def _header(step: int, cut: Cut, body: bytes, **more: str) -> bytes:
    header = {"format": FORMAT, "step": step, "total": cut.total, "chunk_size": cut.chunk_size, "body": body.hex()}
    return json.dumps({**header, **more}, separators=(",", ":")).encode()


def _read_header(line: bytes) -> tuple[dict[str, object], int, Cut, bytes]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ManifestError(f"what the source serves is not {FORMAT}: it begins {line[:60]!r}") from e
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        spoken = header.get("format") if isinstance(header, dict) else line[:60]
        raise ManifestError(
            f"the source speaks {reprlib.repr(spoken)}, not {FORMAT}: run the same torchft on both sides"
        )
    step, total, chunk_size = (header.get(k) for k in ("step", "total", "chunk_size"))
    if type(step) is not int or type(total) is not int or type(chunk_size) is not int:
        raise ManifestError("the header's numbers are missing")
    if not 0 <= total <= MAX_TOTAL or chunk_size not in _CHUNK_SIZES or not 0 <= step < 1 << 63:
        raise ManifestError(
            f"the header announces step {reprlib.repr(step)}, {reprlib.repr(total)} bytes in chunks of "
            f"{reprlib.repr(chunk_size)}"
        )
    try:
        body = bytes.fromhex(str(header.get("body")))
    except ValueError as e:
        raise ManifestError(f"the manifest's hash is not readable: {e}") from e
    return header, step, Cut(total, chunk_size), body
