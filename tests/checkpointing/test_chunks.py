"""How a state's bytes are cut and addressed, and the documents that tell it with its hashes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.checkpointing import IntegrityError, ManifestError
from torchft.checkpointing.chunks import (
    CHUNK_SIZE,
    ByteRun,
    Cut,
    Seal,
    digest,
    read_hashes,
    read_manifest,
    write_hashes,
    write_manifest,
)
from torchft.checkpointing.description import describe
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.snapshot import host_run


def seal(manifest: Manifest, run: ByteRun) -> Seal:
    """The hashes of a state."""
    cut = Cut.shared(manifest.total)
    chunks = b"".join(digest(run.views(*cut.span(i))) for i in range(cut.count))
    return Seal(cut, chunks, digest([memoryview(manifest.body)]))


@pytest.mark.parametrize(
    ("total", "size", "count"),
    [
        (0, CHUNK_SIZE, 0),
        (CHUNK_SIZE, CHUNK_SIZE, 1),
        (CHUNK_SIZE + 1, 1 << 20, 9),
        (16 << 20, 1 << 20, 16),
        ((16 << 20) + 1, (1 << 20) + (64 << 10), 16),
        (100 << 20, 6 * (1 << 20) + (256 << 10), 16),
        (128 << 20, CHUNK_SIZE, 16),
        (4 << 30, CHUNK_SIZE, 512),
    ],
)
def test_a_small_state_has_a_part_for_each_of_many_sources(total: int, size: int, count: int) -> None:
    cut = Cut.shared(total)
    assert (cut.chunk_size, cut.count) == (size, count)


def test_same_state_gives_the_same_root_and_another_byte_another_root() -> None:
    def root(value: float) -> str:
        manifest, sources = describe({"w": torch.full((10,), value), "lr": 0.1})
        return seal(manifest, host_run(sources)).root

    assert root(1.0) == root(1.0)
    assert root(1.0) != root(2.0)


def test_damaged_documents_are_refused() -> None:
    manifest, sources = describe({"w": torch.arange(CHUNK_SIZE // 4 + 5), "lr": 0.25})
    sealed = seal(manifest, host_run(sources))
    document, hashes = write_manifest(3, manifest), write_hashes(3, sealed)
    assert read_manifest(document) == (3, manifest, sealed.cut)
    assert read_hashes(hashes) == (3, sealed)
    assert sealed.cut.count == 16
    for damaged in (document.replace(b"0.25", b"0.26"), document[:-1], hashes):
        with pytest.raises((IntegrityError, ManifestError)):
            read_manifest(damaged)
    for damaged in (hashes.replace(sealed.root.encode(), b"0" * 32), hashes[:-1], document):
        with pytest.raises((IntegrityError, ManifestError)):
            read_hashes(damaged)
    with pytest.raises(ManifestError, match="torchft-checkpoint/1"):
        read_manifest(b"\x80\x04\x95pickle\n\n")
    with pytest.raises(ManifestError, match="chunk table"):
        read_hashes(write_hashes(3, Seal(sealed.cut, sealed.chunks[:-16], sealed.body)))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_reading_arbitrary_bytes_only_ever_refuses(body: bytes) -> None:
    with pytest.raises((ManifestError, IntegrityError)):
        read_manifest(body)
    with pytest.raises((ManifestError, IntegrityError)):
        read_hashes(body)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.data())
def test_a_run_of_bytes_is_read_where_it_is(lengths: list[int], data: st.DataObject) -> None:
    whole = bytes(range(sum(lengths)))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    run = ByteRun([memoryview(whole)[start : start + n] for start, n in zip(starts, lengths, strict=True)])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    views = run.views(start, stop)
    assert b"".join(views) == whole[start:stop]
    assert len(views) == run.pieces(start, stop)
