"""Whatever a hostile source, reader or member sends is refused with an error of ours, at once, in bounded memory.

Each failure names the case; ``python -m tests.checkpointing.hostile NAME NUMBER`` prints its bytes.
"""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.checkpointing.hostile import CASES
from tests.checkpointing.hostile_manifest import STATES, random_for
from torchft.checkpointing import CheckpointError, PGTransport, pg_transport
from torchft.checkpointing import destination as destinations
from torchft.checkpointing.chunks import DIGEST_BYTES, open_manifest, parse_manifest, read_hashes, read_sample
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.http_lent import Borrower, Loan, is_lent
from torchft.checkpointing.http_wire import MAX_SAMPLE, HeadReader, WireError, content_range, parse_indices, parse_range
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.pg_stream import Prologue
from torchft.checkpointing.transport import IntegrityError, ManifestError
from torchft.runtime.deadline import Deadline

SLOWEST = 30.0
"""Seconds that a case may take on a busy machine; all are of a few hundred kilobytes at most."""
MEASURED = 25
"""Of so many cases one is run under tracemalloc, which makes it several times slower."""
SMALL = 1 << 20
LIMIT = timedelta(seconds=5)

Attack = Callable[[bytes], object]


def run(name: str, numbers: range, attack: Attack, allowed: tuple[type[Exception], ...], factor: int) -> int:
    """Runs the cases; how many were accepted.

    Args:
        name: of :data:`CASES`.
        numbers: which.
        attack: what is done with the bytes.
        allowed: how it may end, if not well.
        factor: bytes that Python may allocate for each byte that came, beyond a megabyte.
    """
    accepted = 0
    for number in numbers:
        data = CASES[name](random_for(name, number))
        measured = number % MEASURED == 0
        if measured:
            tracemalloc.start()
        began = time.perf_counter()
        said = ""
        try:
            attack(data)
            accepted += 1
        except allowed as e:
            said = str(e)
        except BaseException as e:
            raise AssertionError(f"{name} {number}: {type(e).__name__}: {str(e)[:500]}") from e
        finally:
            peak = tracemalloc.get_traced_memory()[1] if measured else 0
            tracemalloc.stop()
        assert len(said) < 10_000, f"{name} {number}: an error of {len(said)} characters"
        assert time.perf_counter() - began < SLOWEST, f"{name} {number} took {time.perf_counter() - began:.1f} s"
        assert peak < factor * len(data) + SMALL, f"{name} {number}: {peak} bytes for {len(data)}"
    return accepted


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy on casts that overflow, torch on rare dtypes
        gc.freeze()  # what the collector need not look at again and again
        yield
        gc.unfreeze()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Tensor memory: asked for no more than was announced. Yields what starts the count with the allowance."""
    left = 0

    def fresh(length: int) -> torch.Tensor:
        nonlocal left
        left -= length
        assert left >= 0, "more memory was asked for than was announced"
        if length > 64 << 20:
            raise RuntimeError("there is not so much memory")
        return torch.empty(length, dtype=torch.uint8)

    def allow(allowance: int) -> None:
        nonlocal left
        left = allowance

    monkeypatch.setattr(destinations, "huge_empty", fresh)
    yield allow


@pytest.mark.parametrize("part", range(3))
def test_manifests(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, and what could be read is also built, into fresh memory and into live tensors."""
    built = 0
    with counted(monkeypatch) as allow:

        def attack(data: bytes) -> None:
            nonlocal built
            manifest = Manifest.parse(data)
            for spec in manifest.tensors:
                if spec.extent >= 0 and not spec.packed:
                    last = sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
                    assert spec.offset + (last + 1) * spec.dtype.itemsize <= manifest.extents[spec.extent]
            assert sum(manifest.extents) == manifest.total <= 1 << 50
            for into in (None, STATES[built % len(STATES)]):
                allow(manifest.total)
                try:
                    Destination(manifest, into).finish()
                except CheckpointError:
                    continue
            built += 1

        run("manifest", range(part * 10_000, (part + 1) * 10_000), attack, (ManifestError,), 60)
    assert built > 500  # the grammar makes manifests that can be read, too


def test_documents() -> None:
    def attack(data: bytes) -> None:
        _, cut, body = open_manifest(data)
        manifest = parse_manifest(body, cut)
        assert manifest.total == cut.total
        assert cut.count <= max(1, cut.total >> 12)

    assert run("document", range(14_000), attack, (ManifestError, IntegrityError), 60) > 5


def test_chunk_tables() -> None:
    def attack(data: bytes) -> None:
        _, seal = read_hashes(data)
        assert len(seal.chunks) == 16 * seal.cut.count

    assert run("hashes", range(17_000), attack, (ManifestError, IntegrityError), 60) > 5


def test_samples() -> None:
    wanted = [0, 1, 4]

    def attack(data: bytes) -> None:
        _, sample = read_sample(data, wanted)
        assert sorted(sample.chunks) == [i for i in wanted if i < sample.cut.count]
        assert all(len(value) == 16 for value in sample.chunks.values())

    assert run("sample", range(6_000), attack, (ManifestError,), 60) > 5


def test_indices() -> None:
    def attack(data: bytes) -> None:
        read = parse_indices(data.decode("latin-1"))
        if read is None:
            raise ManifestError("refused")
        assert read == sorted(set(read))
        assert len(read) <= MAX_SAMPLE

    assert run("indices", range(6_000), attack, (ManifestError,), 60) > 100


class _Socket:
    """Gives what it was given, a few bytes at a time, and then the end."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._sizes = 1

    def setsockopt(self, *_: object) -> None:
        pass

    def recv(self, most: int) -> bytes:
        self._sizes = self._sizes * 7 % 4096 + 1
        size = min(most, self._sizes)
        data, self._data = self._data[:size], self._data[size:]
        return bytes(data)


def test_heads() -> None:
    def attack(data: bytes) -> None:
        socket: Any = _Socket(data)
        reader = HeadReader(socket)
        while (head := reader.head(Deadline(5))) is not None:
            line, headers = head
            assert len(line) + sum(len(k) + len(v) for k, v in headers.items()) <= 16 << 10
            assert all(name == name.strip().lower() for name in headers)

    assert run("head", range(14_000), attack, (WireError,), 20) > 1000


def test_ranges() -> None:
    def attack(data: bytes) -> None:
        text = data.decode("latin-1")
        for total in (0, 1, 100, 1 << 50):
            span = parse_range(text, total)
            assert span is None or 0 <= span[0] < span[1] <= total
        answered = content_range(text)
        assert answered is None or all(n >= 0 for n in answered)

    run("span", range(16_000), attack, (), 60)


def test_loans() -> None:
    """Those of the right number of bytes are tried, in this process's own memory; most of it is not there."""
    me, target = Borrower(os.getpid()), bytearray(1000)

    def attack(data: bytes) -> None:
        if is_lent(len(data) + DIGEST_BYTES, 1):
            me.copy(Loan(data, 1000), [memoryview(target)], lambda _: None)

    run("loan", range(6_000), attack, (ManifestError, OSError), 60)


def test_prologues() -> None:
    def attack(data: bytes) -> None:
        prologue = Prologue.unpack(data)
        assert 0 < prologue.body <= 256 << 20 or (not prologue.body and 0 < prologue.total <= 1000)
        assert 1 << 20 <= prologue.bucket <= 64 << 20
        assert prologue.trailer < (1 << 32)

    assert run("prologue", range(5_000), attack, (ManifestError,), 60) > 50


class _Done:
    """A work that has ended."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def wait(self, timeout: timedelta) -> bool:
        if self._error is not None:
            raise self._error
        return True


class _Member:
    """The other member of a group: sends these bytes, whatever sizes are asked for, and dies."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Any:
        return _Done(None)

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Any:
        wanted = tensors[0].numel()
        data, self._data = self._data[:wanted], self._data[wanted:]
        if data:
            tensors[0][: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return _Done(None if len(data) == wanted else RuntimeError("Connection closed by peer"))


def test_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a process group, from the first message to the last."""
    live = [{"w": torch.zeros(5)}, torch.zeros(5), None]
    with counted(monkeypatch) as allow:
        parse = Manifest.parse

        def announced(body: bytes, allow_pickle: bool = False) -> Manifest:
            manifest = parse(body, allow_pickle)
            allow(manifest.total)
            return manifest

        monkeypatch.setattr(pg_transport.Manifest, "parse", announced)

        def attack(data: bytes) -> None:
            into = live[len(data) % 3]
            member: Any = _Member(data)
            transport: PGTransport[Any] = PGTransport(member, LIMIT, "cpu", None if into is None else lambda: into)
            transport.recv_checkpoint(0, "<n/a>", 7, LIMIT)

        assert run("stream", range(4_000), attack, (CheckpointError,), 1000) > 5
