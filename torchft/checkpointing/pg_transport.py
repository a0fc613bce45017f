"""State transfer over a process group: send and receive, in place where possible, verified.

The idea
    The source sends prologue, manifest, data and hashes (:mod:`torchft.checkpointing.pg_stream`) with the process
    group that the replica groups share anyway: no other port, no other address. ``send_checkpoint`` returns when all
    is sent, so nothing is copied first and ``disallow_checkpoint`` has nothing to wait for.

Rules
    - Data goes out of and into tensor memory where extents are large; small ones are gathered in a buffer that is kept.
    - A few messages are on their way while the one before is hashed.
    - Every wait is bounded by the call's timeout. After a failure the process group must be configured anew.
    - A receiver that fails does not keep the others from getting their state; the call then raises, naming it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
from torch.distributed import Work

from torchft.checkpointing.chunks import ByteRun, Seal, host_view
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.manifest import Manifest, describe
from torchft.checkpointing.pg_stream import BUCKET, PROLOGUE_BYTES, Bucket, ChunkHasher, Prologue, buckets
from torchft.checkpointing.snapshot import host_run
from torchft.checkpointing.transport import (
    COPY_BELOW,
    CheckpointError,
    CheckpointTimeout,
    CheckpointTransport,
    IntegrityError,
    ManifestError,
    SourceLost,
    StepNotServed,
)
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["PGTransport"]

T = TypeVar("T")
logger = SpeakerLogger(__name__)

_TAG = 1
_AHEAD = 3


class _SendRecv(Protocol):
    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work: ...


class PGTransport(CheckpointTransport[T]):
    """Sends and receives live states with a process group.

    Args:
        pg: anything with ``send`` and ``recv`` of a process group, configured so that its ranks are replica ranks.
        timeout: of calls that are given none of their own.
        device: what the process group communicates, and where fresh tensors are handed out.
        state_dict: returns the tree whose tensors are received into where path, dtype and shape match.
        allow_pickle: also send and load what the format refuses.
        copy_below: bytes; smaller storages are copied on both sides, see ``COPY_BELOW``.
    """

    def __init__(
        self,
        pg: _SendRecv,
        timeout: timedelta,
        device: torch.device | str,
        state_dict: Callable[[], object] | None = None,
        *,
        allow_pickle: bool = False,
        copy_below: int = COPY_BELOW,
    ) -> None:
        self._pg = pg
        self._copy_below = copy_below
        self._timeout = timeout
        self._device = torch.device(device)
        self._state_dict = state_dict
        self._allow_pickle = allow_pickle
        self._buffers: list[torch.Tensor] = []
        self.receives_in_place = state_dict is not None

    def metadata(self) -> str:
        return "<n/a>"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta | None = None) -> None:
        """Sends the state to all of ``dst_ranks``; returns when all is sent."""
        deadline = Deadline(timeout or self._timeout)
        clock = _Clock()
        manifest, sources = describe(state_dict, self._allow_pickle)
        run = host_run(sources, self._copy_below)
        logger.info("preparing state_dict took %.3fs (step %d, %d bytes)", clock.lap(), step, manifest.total)
        link = _Link(self._pg, self._device, dst_ranks, deadline, self._buffers)
        prologue = Prologue(step, len(manifest.body), manifest.total)
        link.send(_tensor(prologue.pack()))
        link.send(_tensor(manifest.body))
        link.drain()
        logger.info("send manifest took %.3fs (%d bytes)", clock.lap(), len(manifest.body))
        hasher = ChunkHasher()
        for bucket in buckets(manifest.extents):
            views = run.views(bucket.start, bucket.stop)
            link.send(_memory(bucket, sources, views, link.buffer))
            hasher.update(views)
        seal = Seal.of(manifest, hasher.finish())
        link.send(_tensor(bytes.fromhex(seal.root) + seal.chunks))
        link.drain()
        took = clock.lap()
        logger.info(
            "send tensors took %.3fs (%d bytes to replica ranks %s, %.2f GB/s)",
            took,
            manifest.total,
            dst_ranks,
            manifest.total * len(dst_ranks) / took / 1e9,
        )
        link.raise_failures(step)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta | None = None) -> T:
        deadline = Deadline(timeout or self._timeout)
        clock = _Clock()
        link = _Link(self._pg, self._device, [src_rank], deadline, self._buffers)
        prologue = Prologue.unpack(link.recv_bytes(PROLOGUE_BYTES))
        body = link.recv_bytes(prologue.body)
        if prologue.step != step:
            raise StepNotServed(
                f"step {step} was asked for, but replica rank {src_rank} sends step {prologue.step}: the two are not "
                "in the same quorum"
            )
        manifest = Manifest.parse(body, self._allow_pickle)
        if manifest.total != prologue.total:
            raise ManifestError(
                f"replica rank {src_rank} describes {manifest.total} bytes but announces {prologue.total}"
            )
        into = None if self._state_dict is None else self._state_dict()
        destination = Destination(manifest, into, self._device, self._copy_below)
        hasher = ChunkHasher()
        self._receive(link, manifest, destination, hasher)
        trailer = link.recv_bytes(prologue.trailer)
        self._verify(Seal.of(manifest, hasher.finish()), trailer, step, src_rank)
        state = destination.finish(self._allow_pickle)
        took = clock.lap()
        logger.info(
            "received step %d from replica rank %d: %d bytes, %d of them in place, in %.3fs, %.2f GB/s, verified, "
            "root %s",
            step,
            src_rank,
            manifest.total,
            destination.bytes_in_place,
            took,
            manifest.total / took / 1e9,
            trailer[:16].hex(),
        )
        return cast(T, state)

    def shutdown(self, wait: bool = True) -> None:
        """Frees the buffers. The process group belongs to the caller."""
        self._buffers.clear()

    def _receive(self, link: _Link, manifest: Manifest, destination: Destination, hasher: ChunkHasher) -> None:
        run: ByteRun = destination.run
        arriving: deque[tuple[Bucket, torch.Tensor]] = deque()

        def land() -> None:
            bucket, message = arriving.popleft()
            link.wait_first()
            views = run.views(bucket.start, bucket.stop)
            if message.device.type != "cpu" or bucket.extent < 0:
                data = host_view(message.cpu())
                for view in views:
                    view[:] = data[: len(view)]
                    data = data[len(view) :]
            link.done_with(message)
            hasher.update(views)

        for bucket in buckets(manifest.extents):
            if bucket.extent >= 0 and self._device.type == "cpu":
                message = destination.piece(bucket.extent)[bucket.offset :][: bucket.stop - bucket.start]
            else:
                message = link.buffer(bucket.stop - bucket.start)
            link.recv(message)
            arriving.append((bucket, message))
            if len(arriving) >= _AHEAD:
                land()
        while arriving:
            land()

    def _verify(self, seal: Seal, trailer: bytes, step: int, src_rank: int) -> None:
        announced = Seal(seal.cut, trailer[16:], seal.body)
        if bytes.fromhex(seal.root) == trailer[:16] and announced == seal:
            return
        bad = [i for i in range(seal.cut.count) if announced.digest_of(i) != seal.digest_of(i)]
        what = f"chunks {bad[:8]} of {seal.cut.count}" if bad else "the manifest"
        raise IntegrityError(
            f"step {step} from replica rank {src_rank} arrived damaged: {what} do not have the announced hash. The "
            "memory of one of the machines or the network between them corrupts data"
        )


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        self._last, last = now, self._last
        return max(now - last, 1e-9)


class _Link:
    """Messages to some ranks, or from one: a few on their way at a time, in order, all before one deadline."""

    def __init__(
        self,
        pg: _SendRecv,
        device: torch.device,
        ranks: Sequence[int],
        deadline: Deadline,
        buffers: list[torch.Tensor],
    ) -> None:
        self._pg = pg
        self._device = device
        self._ranks = list(ranks)
        self._deadline = deadline
        self._free = buffers
        self._lent: set[int] = set()
        self._under_way: deque[tuple[torch.Tensor, list[tuple[int, Work]]]] = deque()
        self._failed: dict[int, Exception] = {}

    def buffer(self, length: int) -> torch.Tensor:
        """Memory for one message; given back by :meth:`done_with`."""
        whole = self._free.pop() if self._free else torch.empty(BUCKET, dtype=torch.uint8, device=self._device)
        self._lent.add(whole.data_ptr())
        return whole[:length]

    def done_with(self, message: torch.Tensor) -> None:
        if message.data_ptr() in self._lent:
            self._lent.remove(message.data_ptr())
            assert message._base is not None
            self._free.append(message._base)

    def send(self, message: torch.Tensor) -> None:
        message = message if message.device.type == self._device.type else message.to(self._device)
        works: list[tuple[int, Work]] = []
        for rank in self._ranks:
            if rank not in self._failed:
                try:
                    works.append((rank, self._pg.send([message], rank, _TAG)))
                except Exception as e:
                    self._failed[rank] = e
        self._under_way.append((message, works))
        while len(self._under_way) > _AHEAD:
            self._sent()

    def _sent(self) -> None:
        message, works = self._under_way.popleft()
        for rank, work in works:
            if rank not in self._failed:
                try:
                    self._wait(work, rank)
                except Exception as e:
                    self._failed[rank] = e
        self.done_with(message)
        if len(self._failed) == len(self._ranks):
            self._under_way.clear()

    def drain(self) -> None:
        """Returns when everything sent so far is out, or has failed."""
        while self._under_way:
            self._sent()

    def raise_failures(self, step: int) -> None:
        if self._failed:
            text = "; ".join(f"replica rank {r}: {e}" for r, e in self._failed.items())
            late = all(isinstance(e, TimeoutError) for e in self._failed.values())
            kind = CheckpointTimeout if late else CheckpointError
            raise kind(f"step {step} could not be sent to {text}") from next(iter(self._failed.values()))

    def recv(self, message: torch.Tensor) -> None:
        rank = self._ranks[0]
        try:
            self._under_way.append((message, [(rank, self._pg.recv([message], rank, _TAG))]))
        except Exception as e:
            raise self._lost(e) from e

    def wait_first(self) -> None:
        """Waits for the oldest receive."""
        _, [(rank, work)] = self._under_way.popleft()
        try:
            self._wait(work, rank)
        except CheckpointError:
            raise
        except Exception as e:
            raise self._lost(e) from e

    def recv_bytes(self, length: int) -> bytes:
        message = torch.zeros(length, dtype=torch.uint8, device=self._device)
        self.recv(message)
        self.wait_first()
        return message.cpu().numpy().tobytes()

    def _wait(self, work: Work, rank: int) -> None:
        left = self._deadline.remaining()
        try:
            if left > 0:
                work.wait(timedelta(seconds=max(0.001, left)))
                return
        except Exception as e:
            if not self._deadline.expired:
                raise
            raise self._late(rank) from e
        if not work.is_completed():
            raise self._late(rank)

    def _late(self, rank: int) -> CheckpointTimeout:
        return CheckpointTimeout(
            f"replica rank {rank} did not take part within {self._deadline.timeout:g}s: it is slow, hangs, or died; a "
            "longer timeout allows for a larger state"
        )

    def _lost(self, cause: Exception) -> SourceLost:
        return SourceLost(f"replica rank {self._ranks[0]}, the source, was lost: {cause}")


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _memory(
    bucket: Bucket,
    sources: Sequence[torch.Tensor],
    views: Sequence[memoryview],
    buffer: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """A message with the bytes of a bucket: the tensor's own memory, or a buffer they are gathered in."""
    length = bucket.stop - bucket.start
    if bucket.extent >= 0:
        return sources[bucket.extent][bucket.offset : bucket.offset + length]
    message = buffer(length)
    gathered = message if message.device.type == "cpu" else torch.empty(length, dtype=torch.uint8)
    data = host_view(gathered)
    for view in views:
        data[: len(view)] = view
        data = data[len(view) :]
    return message if gathered is message else message.copy_(gathered)
