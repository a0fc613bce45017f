"""State transfer over a process group: send and receive, in place where possible, verified.

The idea
    The source sends prologue, manifest, data and hashes (:mod:`torchft.checkpointing.pg_stream`) with the process
    group that the replica groups share anyway: no other port, no other address. ``send_checkpoint`` returns when all
    is sent, so nothing is copied first and ``disallow_checkpoint`` has nothing to wait for.

Rules
    - Data goes out of and into tensor memory where extents are large; small ones are gathered in a buffer that is kept.
    - Between hosts the receiver announces very many messages before the first byte of data comes. Announcing while
      bytes arrive contends with gloo's thread for the lock that it holds while it reads, and cost a fifth of the speed.
    - Data is hashed just before it is sent, message by message, and when it has come, in groups of messages, beside the
      transfer of the others. Groups: what wakes up for each message takes a processor from those who move the data.
    - Every wait is bounded by the call's timeout. After a failure the process group must be configured anew.
    - An abort ends a call at its next message; the message it waits for ends with the process group, which belongs to
      the caller and is to be aborted as well.
    - Who waits for a state that cannot be given is told so, unless a part of it has been sent: gloo ends a process that
      gets another message than it waits for.
    - A receiver that dies or stops does not keep the others from getting their state; the call then raises, naming it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch

from torchft.checkpointing import metrics
from torchft.checkpointing.chunks import Seal, host_view
from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.live import LiveTensors, look_at
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.pg_link import GROUP, Buffers, Link, SendRecv, message_of
from torchft.checkpointing.pg_local import LocalWay, local_offer
from torchft.checkpointing.pg_source import Outgoing
from torchft.checkpointing.pg_stream import (
    ANNOUNCED,
    BUCKET,
    BY_GROUP,
    DEVICE_BUCKET,
    LOCALLY,
    MAX_REASON,
    PROLOGUE_BYTES,
    Bucket,
    ChunkHasher,
    Prologue,
    buckets,
)
from torchft.checkpointing.snapshot import host_run
from torchft.checkpointing.transfers import Transfer, Transfers
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
from torchft.runtime.collection import collection_put_off
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["PGTransport"]

T = TypeVar("T")
logger = SpeakerLogger(__name__)

_ANNOUNCED = 4096
"""Messages that a receiver has announced, at most; more follow when half of them are there."""
_REFUSAL = 2.0
"""Seconds that a receiver has to take the reason why there is no state for it."""
_WORTH_A_WAY = 32 << 20
"""Bytes: less is there by the group before the two sides have found another way."""


class PGTransport(CheckpointTransport[T]):
    """Sends and receives live states with a process group.

    Args:
        pg: anything with ``send`` and ``recv`` of a process group, configured so that its ranks are replica ranks.
        timeout: of calls that are given none of their own.
        device: what the process group communicates, and where fresh tensors are handed out.
        state_dict: returns the tree whose tensors are received into where path, dtype and shape match.
        allow_pickle: also send and load what the format refuses.
        copy_below: bytes; smaller storages are copied on both sides, see ``COPY_BELOW``.
        local_from: bytes; smaller states go over the process group between processes of one machine too.
    """

    needs_metadata = False

    def __init__(
        self,
        pg: SendRecv,
        timeout: timedelta,
        device: torch.device | str,
        state_dict: Callable[[], object] | None = None,
        *,
        allow_pickle: bool = False,
        copy_below: int = COPY_BELOW,
        local_from: int = _WORTH_A_WAY,
    ) -> None:
        self._pg = pg
        self._copy_below = copy_below
        self._local_from = local_from
        self._timeout = timeout
        self._device = torch.device(device)
        self._state_dict = state_dict
        self._allow_pickle = allow_pickle
        self._buffers = Buffers(self._device)
        self._running = Transfers()
        self._begun: frozenset[int] = frozenset()  # receivers of a state that could not be sent as a whole
        self.receives_in_place = state_dict is not None

    def metadata(self) -> str:
        return "<n/a>"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta | None = None) -> None:
        """Sends the state to all of ``dst_ranks``; returns when all is sent, at once where there are none."""
        if not dst_ranks:
            return
        with self._running.begin() as transfer:
            self._send(dst_ranks, step, state_dict, Deadline(timeout or self._timeout), transfer)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta | None = None) -> T:
        with self._running.begin() as transfer:
            return self._recv(src_rank, step, Deadline(timeout or self._timeout), transfer)

    def abort(self, reason: str = "the caller gave it up") -> None:
        self._running.abort(reason)

    def decline(self, step: int, reason: str, dst_ranks: Sequence[int] = ()) -> None:
        begun, self._begun = self._begun, frozenset()
        told = " ".join(reason.split()).encode("utf-8", "replace")[:MAX_REASON] or b"no reason was given"
        deadline = Deadline(_REFUSAL)
        with self._running.begin() as transfer:
            links = {rank: self._link(rank, deadline, transfer) for rank in dst_ranks if rank not in begun}

            def attempt(rank: int, act: Callable[[Link], None]) -> bool:
                try:
                    act(links[rank])
                except Exception as e:
                    logger.debug("replica rank %d does not hear that it gets no state: %s", rank, e)
                    return False
                return True

            def tell(link: Link) -> None:
                link.send(message_of(Prologue(step, 0, len(told), waits=False).pack()))
                link.send(message_of(told))

            for rank in [rank for rank in links if attempt(rank, tell)]:
                attempt(rank, Link.drain)

    def shutdown(self, wait: bool = True) -> None:
        """Ends what runs, and frees the buffers. The process group, whose messages may have to end, is the caller's."""
        self._running.close()
        self._buffers.clear()

    def _send(self, dst_ranks: list[int], step: int, state_dict: T, deadline: Deadline, transfer: Transfer) -> None:
        clock = _Clock()
        manifest, extents = describe(state_dict, self._allow_pickle)
        run = host_run(extents, self._copy_below)
        logger.info("preparing state_dict took %.3fs (step %d, %d bytes)", clock.lap(), step, manifest.total)
        on_host = self._device.type == "cpu"
        bucket_size = BUCKET if on_host else DEVICE_BUCKET
        prologue = Prologue(step, len(manifest.body), manifest.total, bucket_size, waits=on_host)
        links = {rank: self._link(rank, deadline, transfer) for rank in dst_ranks}
        local = None
        if on_host and manifest.total >= self._local_from:
            local = local_offer(step, manifest, run, deadline)
        self._begun = frozenset(links)
        try:
            failed = Outgoing(prologue, manifest, extents, run, logger, local).to_all(links)
        finally:
            if local is not None:
                local.close()
        transfer.check()
        if failed:
            text = "; ".join(f"replica rank {rank}: {e}" for rank, e in failed.items())
            late = all(isinstance(e, TimeoutError) for e in failed.values())
            kind = CheckpointTimeout if late else CheckpointError
            raise kind(f"step {step} could not be sent to {text}") from next(iter(failed.values()))
        self._begun = frozenset()

    def _link(self, rank: int, deadline: Deadline, transfer: Transfer) -> Link:
        return Link(self._pg, self._device, rank, deadline, self._buffers, transfer)

    def _recv(self, src_rank: int, step: int, deadline: Deadline, transfer: Transfer) -> T:
        clock = _Clock()
        live = look_at(self._state_dict)
        link = self._link(src_rank, deadline, transfer)
        prologue = Prologue.unpack(link.recv_bytes(PROLOGUE_BYTES))
        if prologue.step != step:
            raise StepNotServed(
                f"step {step} was asked for, but replica rank {src_rank} sends step {prologue.step}: the two are not "
                "in the same quorum"
            )
        if not prologue.body:
            reason = link.recv_bytes(prologue.total).decode("utf-8", "replace")
            raise StepNotServed(f"step {step} was asked for, but replica rank {src_rank} could not offer it: {reason}")
        come = self._recv_locally(link, prologue, src_rank, deadline, live) if prologue.way else None
        destination, root = come or self._recv_by_group(link, prologue, src_rank, live)
        state = destination.finish(self._allow_pickle)
        took = clock.lap()
        metrics.RECEIVED_SECONDS.inc(took)
        logger.info(
            "received step %d from replica rank %d%s: %d bytes, %d of them in place, in %.3fs, %.2f GB/s, verified, "
            "root %s",
            step,
            src_rank,
            " on this machine" if come else "",
            prologue.total,
            destination.bytes_in_place,
            took,
            prologue.total / took / 1e9,
            root,
        )
        return cast(T, state)

    def _recv_locally(
        self, link: Link, prologue: Prologue, src_rank: int, deadline: Deadline, live: Callable[[], LiveTensors]
    ) -> tuple[Destination, str] | None:
        """The state's bytes and root by the local way, if there is one from here."""
        way = LocalWay.parse(link.recv_bytes(prologue.way))
        with link.ends_transfer(), way.download(src_rank, prologue.step, deadline, link.transfer) as download:
            try:
                manifest, _ = download.begin(self._allow_pickle)
            except CheckpointError as e:
                link.transfer.check()
                # Refused is what most are: the source is on another machine.
                level = logging.DEBUG if isinstance(e, SourceLost) else logging.WARNING
                logger.log(level, "the state comes over the process group: %s", e)
            else:
                link.answer(LOCALLY)
                destination = self._destination(manifest, prologue, src_rank, live())
                try:
                    return destination, download.run(destination.run, {}).root
                finally:
                    metrics.count(download.progress)
        link.answer(BY_GROUP)
        return None

    def _recv_by_group(
        self, link: Link, prologue: Prologue, src_rank: int, live: Callable[[], LiveTensors]
    ) -> tuple[Destination, str]:
        """The state's bytes and root from the process group."""
        manifest = Manifest.parse(link.recv_bytes(prologue.body), self._allow_pickle)
        destination = self._destination(manifest, prologue, src_rank, live())
        hasher = ChunkHasher()
        coming = buckets(manifest.extents, prologue.bucket)
        link.receive_apart(lambda: self._receive(link, prologue, coming, destination, hasher))
        trailer = link.recv_bytes(prologue.trailer)
        seal = Seal.of(manifest, hasher.finish())
        self._verify(seal, trailer, prologue.step, src_rank)
        return destination, seal.root

    def _destination(self, manifest: Manifest, prologue: Prologue, src_rank: int, live: LiveTensors) -> Destination:
        if manifest.total != prologue.total:
            raise ManifestError(
                f"replica rank {src_rank} describes {manifest.total} bytes but announces {prologue.total}"
            )
        destination = Destination(manifest, live, self._device, self._copy_below)
        for misfit in destination.misfits():
            logger.warning("%s", misfit)
        return destination

    def _receive(
        self, link: Link, prologue: Prologue, coming: Iterator[Bucket], destination: Destination, hasher: ChunkHasher
    ) -> None:
        run = destination.run
        arriving: deque[tuple[Bucket, torch.Tensor]] = deque()
        following = next(coming, None)

        @collection_put_off()
        def announce() -> None:
            nonlocal following
            while following is not None and len(arriving) < _ANNOUNCED:
                length = following.stop - following.start
                if following.extent >= 0 and self._device.type == "cpu":
                    message = destination.piece(following.extent)[following.offset :][:length]
                elif link.may_lend(prologue.bucket):
                    message = link.buffer(length)
                else:
                    return  # until some of the buffers have come
                link.recv(message)
                arriving.append((following, message))
                following = next(coming, None)

        announce()
        if prologue.waits:
            link.answer(ANNOUNCED)
        while arriving:
            group: list[tuple[Bucket, torch.Tensor]] = []
            size = 0
            while arriving and size < GROUP:
                group.append(arriving.popleft())
                size += group[-1][1].numel()
            link.await_first(len(group))
            for bucket, message in group:
                if message.device.type != "cpu" or bucket.extent < 0:
                    data = host_view(message.cpu())
                    for view in run.views(bucket.start, bucket.stop):
                        view[:] = data[: len(view)]
                        data = data[len(view) :]
                link.done_with(message)
            if len(arriving) <= _ANNOUNCED // 2:
                announce()
            hasher.update(run.views(group[0][0].start, group[-1][0].stop))

    def _verify(self, seal: Seal, trailer: bytes, step: int, src_rank: int) -> None:
        announced = Seal(seal.cut, trailer[16:], seal.body)
        if bytes.fromhex(seal.root) == trailer[:16] and announced == seal:
            metrics.count_whole(seal.cut.total)
            return
        bad = [i for i in range(seal.cut.count) if announced.digest_of(i) != seal.digest_of(i)]
        metrics.count_whole(seal.cut.total, max(1, len(bad)))
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
