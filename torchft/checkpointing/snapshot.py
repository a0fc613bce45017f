"""The state of one step as the source holds it while others read it.

The idea
    ``copy``: the data is copied into one arena, which is kept and used again for the next step, by a few threads at
    once and, from a device, on a side stream into pinned memory; the copying runs beside forward and backward.
    ``lock``: nothing is copied, the tensors themselves are read; only what has not been read when they are about to be
    written is copied then (:meth:`Arena.copy`). Either way the data is a :class:`ByteRun`.

Invariants
    - One :class:`Arena` backs one snapshot at a time; its owner retires the old one before it takes the next.
    - Memory held is the largest state so far, given back when a state needs less than a quarter of it, and on close.
      Of what was reserved only what was written is really there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from torchft.checkpointing.chunks import ByteRun
from torchft.checkpointing.memory import StorageBytes, huge_empty
from torchft.checkpointing.transport import CheckpointTimeout
from torchft.runtime.collection import collection_put_off
from torchft.runtime.deadline import Deadline

__all__ = ["Arena", "SideStreams", "host_run"]

_PIECE = 2 << 20
_DEVICE_PIECE = 64 << 20
_ROOM = 32 << 20
_THREADS = max(2, min(8, (os.cpu_count() or 2) // 2))


class SideStreams:
    """For copies from CUDA devices beside what is computed, of the tensors as the launched kernels leave them.

    Args:
        sources: those on devices are copied later.
    """

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for source in sources:
            if source.device.type != "cpu" and source.device not in self._streams:
                stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
                stream.wait_stream(torch.cuda.current_stream(source.device))  # the last write included
                self._streams[source.device] = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """Launches a copy into pinned memory; the event is done when it is."""
        stream = self._streams[source.device]
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        source.record_stream(stream)
        return event


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

    def reserve(self, sources: Sequence[torch.Tensor], least: int = 0) -> ByteRun:
        """Memory for a copy of these bytes, not written yet.

        Args:
            sources: one-dimensional contiguous ``uint8`` tensors, CPU or CUDA.
            least: bytes that are wanted, if more.
        """
        total = max(least, sum(s.numel() for s in sources))
        held = self._memory
        if held is not None and any(s.device.type == "cuda" for s in sources) and not held.is_pinned():
            held = None
        if held is None or held.numel() < total or held.numel() > 4 * total + _ROOM:
            self._memory = held = None  # free before asking for more
            if any(s.device.type == "cuda" for s in sources):
                held = torch.empty(total, dtype=torch.uint8, pin_memory=True)
            else:
                held = huge_empty(total)
            self._memory = held
        self._data = held[:total]
        return ByteRun([self._data]) if total else ByteRun([])

    def fill(
        self,
        sources: Sequence[torch.Tensor],
        streams: SideStreams,
        deadline: Deadline,
        ready: Callable[[int], None],
    ) -> None:
        """Copies the bytes that :meth:`reserve` was told of; when this returns the sources may be written.

        Args:
            sources: as they were given to ``reserve``.
            streams: made for them when they were as they are to be copied.
            deadline: until when.
            ready: told, in order, up to which byte everything is there.

        Raises:
            CheckpointTimeout: it took longer. Threads may still read the sources for a moment; the memory is given
                up to them.
        """
        data = self._data
        batches = _Batches(self._move_later, (data, sources))
        waits: list[tuple[int, Callable[[float], object]]] = []
        position = 0
        for target, source in _pieces(data, sources):
            position += source.numel()
            if source.device.type == "cpu":
                batches.add(target.data_ptr(), source.data_ptr(), source.numel(), position, waits)
            else:
                batches.flush(position - source.numel(), waits)
                waits.append((position, partial(_synchronize, streams.copy(target, source))))
        batches.flush(position, waits)
        for end, wait in waits:
            try:
                wait(deadline.remaining())
            except TimeoutError as e:
                self._memory = None
                raise CheckpointTimeout(f"copying {data.numel()} bytes took longer than {deadline.timeout:g}s") from e
            ready(end)

    def lend(self, total: int) -> ByteRun:
        """Memory for that many bytes of host memory, not written yet."""
        return self.reserve([torch.empty(0, dtype=torch.uint8)], total)

    def copy(self, source: ByteRun, target: ByteRun, spans: Sequence[tuple[int, int]]) -> None:
        """Copies byte ranges from one run to the same place in another, in parallel."""
        batches = _Batches(self._move_later, (source, target))
        waits: list[tuple[int, Callable[[float], object]]] = []
        for start, stop in spans:
            for at in range(start, stop, _PIECE):
                end = min(stop, at + _PIECE)
                (to,) = target.views(at, end)
                address = _address(to)
                for view in source.views(at, end):
                    batches.add(address, _address(view), len(view), end, waits)
                    address += len(view)
        batches.flush(0, waits)
        for _, wait in waits:
            wait(3600.0)

    def _move_later(self, batch: list[tuple[int, int, int]], keep: object) -> Future[None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="torchft-snapshot")
        return self._pool.submit(_move, batch, keep)

    def close(self) -> None:
        """Gives the memory back and ends the threads. The arena can be used again."""
        self._memory = None
        self._data = torch.empty(0, dtype=torch.uint8)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)


class _Batches:
    """Gathers small copies until they are worth a thread."""

    def __init__(self, submit: Callable[[list[tuple[int, int, int]], object], Future[None]], keep: object) -> None:
        self._submit = submit
        self._keep = keep
        self._batch: list[tuple[int, int, int]] = []
        self._size = 0

    def add(
        self, target: int, source: int, length: int, position: int, waits: list[tuple[int, Callable[[float], object]]]
    ) -> None:
        self._batch.append((target, source, length))
        self._size += length
        if self._size >= _PIECE:
            self.flush(position, waits)

    def flush(self, position: int, waits: list[tuple[int, Callable[[float], object]]]) -> None:
        """What was gathered is copied from now on; up to ``position`` all is there when it is."""
        if self._batch:
            waits.append((position, self._submit(self._batch, self._keep).result))
            self._batch, self._size = [], 0


def _pieces(data: torch.Tensor, sources: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    position = 0
    for source in sources:
        length = source.numel()
        piece = _PIECE if source.device.type == "cpu" else _DEVICE_PIECE
        for at in range(0, length, piece):
            part = source[at : at + piece] if length > piece else source
            yield data[position + at : position + at + part.numel()], part
        position += length


def _synchronize(event: torch.cuda.Event, _left: float) -> None:
    event.synchronize()


def _address(view: memoryview) -> int:
    """Where a view's memory is."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _move(batch: list[tuple[int, int, int]], _keep: object = None) -> None:
    """Copies (to, from, bytes); ``_keep`` is what owns the memory."""
    for target, source, length in batch:
        ctypes.memmove(target, source, length)  # releases the GIL


@collection_put_off()
def host_run(sources: Sequence[StorageBytes], copy_below: int = 0) -> ByteRun:
    """The sources themselves, to be read without a copy; those on a device, or with fewer bytes, are copied.

    Small ones that follow each other are copied into one piece: what sends them does not want thousands of views.
    """
    pieces: list[torch.Tensor | memoryview] = []
    small: list[torch.Tensor] = []
    for source in sources:
        on_host = source.on_host
        if on_host and source.length < copy_below:
            small.append(source.tensor())
            continue
        if small:
            pieces.append(torch.cat(small))
            small = []
        pieces.append(source.view() if on_host else source.tensor().cpu())
    if small:
        pieces.append(torch.cat(small))
    return ByteRun(pieces)
