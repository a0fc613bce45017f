"""The state of one step as the source holds it while others read it.

The idea
    ``copy``: the data is copied into one arena, which is kept and used again for the next step, by a few threads at
    once; then the caller may write its tensors. ``lock``: nothing is copied, the tensors themselves are read, and the
    caller may not write them until the readers are done. Either way the data is a :class:`ByteRun` and the hashes
    follow in the background.

Invariants
    - One :class:`Arena` backs one snapshot at a time; its owner retires the old one before it takes the next.
    - Memory held is the largest state so far, given back when a state needs less than a quarter of it, and on close.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from torchft.checkpointing.chunks import ByteRun, Cut, Seal, digest
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.memory import huge_empty
from torchft.checkpointing.transport import CheckpointTimeout
from torchft.runtime.deadline import Deadline

__all__ = ["Arena", "host_run", "seal_run"]

_PIECE = 2 << 20
_ROOM = 32 << 20
_THREADS = max(2, min(8, (os.cpu_count() or 2) // 2))


class Arena:
    """Memory that holds a copy of a state's data, used again and again."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._data = torch.empty(0, dtype=torch.uint8)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def nbytes(self) -> int:
        """Held now."""
        return 0 if self._memory is None else self._memory.numel()

    def reserve(self, sources: Sequence[torch.Tensor]) -> ByteRun:
        """Memory for a copy of these bytes, not written yet.

        Args:
            sources: one-dimensional contiguous ``uint8`` tensors, CPU or CUDA.
        """
        total = sum(s.numel() for s in sources)
        held = self._memory
        if held is None or held.numel() < total or held.numel() > 4 * total + _ROOM:
            self._memory = held = None  # free before asking for more
            if any(s.device.type == "cuda" for s in sources):
                held = torch.empty(total, dtype=torch.uint8, pin_memory=True)
            else:
                held = huge_empty(total)
            self._memory = held
        self._data = held[:total]
        return ByteRun([self._data]) if total else ByteRun([])

    def fill(self, sources: Sequence[torch.Tensor], deadline: Deadline, ready: Callable[[int], None]) -> None:
        """Copies the bytes that :meth:`reserve` was told of; when this returns the sources may be written.

        Args:
            sources: as they were given to ``reserve``.
            deadline: until when.
            ready: told, in order, up to which byte everything is there.

        Raises:
            CheckpointTimeout: it took longer. Threads may still read the sources for a moment; the memory is given
                up to them.
        """
        data, keep = self._data, (self._data, sources)
        on_device = [s for s in sources if s.device.type != "cpu"]
        if on_device:
            _copy_from_device([(t, s) for t, s in _pieces(data, sources) if s.device.type != "cpu"])
        if data.numel() <= _ROOM // 8:  # not worth a thread
            _move(
                [(t.data_ptr(), s.data_ptr(), s.numel()) for t, s in _pieces(data, sources) if s.device.type == "cpu"]
            )
            ready(data.numel())
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="torchft-snapshot")
        jobs: list[tuple[int, Future[None]]] = []
        batch: list[tuple[int, int, int]] = []
        batched = position = 0
        for target, source in _pieces(data, sources):
            position += source.numel()
            if source.device.type == "cpu":
                batch.append((target.data_ptr(), source.data_ptr(), source.numel()))
                batched += source.numel()
            if batched >= _PIECE or position == data.numel():
                jobs.append((position, self._pool.submit(_move, batch, keep)))
                batch, batched = [], 0
        for end, job in jobs:
            try:
                job.result(deadline.remaining())
            except TimeoutError as e:
                for _, late in jobs:
                    late.cancel()
                self._memory = None
                raise CheckpointTimeout(f"copying {data.numel()} bytes took longer than {deadline.timeout:g}s") from e
            ready(end)

    def close(self) -> None:
        """Gives the memory back and ends the threads. The arena can be used again."""
        self._memory = None
        self._data = torch.empty(0, dtype=torch.uint8)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)


def _pieces(data: torch.Tensor, sources: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    position = 0
    for source in sources:
        length = source.numel()
        if length <= _PIECE:
            yield data[position : position + length], source
        else:
            for at in range(0, length, _PIECE):
                part = source[at : at + _PIECE]
                yield data[position + at : position + at + part.numel()], part
        position += length


def _move(batch: list[tuple[int, int, int]], _keep: object = None) -> None:
    """Copies (to, from, bytes); ``_keep`` is what owns the memory."""
    for target, source, length in batch:
        ctypes.memmove(target, source, length)  # releases the GIL


def _copy_from_device(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies from CUDA memory on a side stream that waits for what was launched before, the last write included."""
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for target, source in pairs:
        stream = streams.get(source.device)
        if stream is None:
            stream = streams[source.device] = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(stream)
    for stream in streams.values():
        stream.synchronize()


def host_run(sources: Sequence[torch.Tensor], copy_below: int = 0) -> ByteRun:
    """The sources themselves, to be read without a copy; those on a device, or with fewer bytes, are copied."""

    def readable(source: torch.Tensor) -> torch.Tensor:
        if source.device.type != "cpu":
            return source.cpu()
        return source.clone() if source.numel() < copy_below else source

    return ByteRun([readable(s) for s in sources])


def seal_run(manifest: Manifest, run: ByteRun, await_bytes: Callable[[int], object]) -> Seal:
    """Hashes the data as it becomes ready.

    Args:
        manifest: of the data.
        run: the data.
        await_bytes: returns when the data is there up to this byte; what it raises ends the hashing.
    """
    cut = Cut(run.total)
    digests: list[bytes] = []
    for index in range(cut.count):
        start, stop = cut.span(index)
        await_bytes(stop)
        digests.append(digest(run.views(start, stop)))
    return Seal.of(manifest, b"".join(digests))
