"""The source's side of a transfer over a process group: to each receiver at its own speed, hashed once.

The idea
    Each receiver has a thread that sends it everything, so one that dies, stops or is slow keeps no other from its
    state. Whoever comes to a part of the data first hashes it, just before it goes out: it is in the cache then, for
    the copy into the socket too. The first receiver's thread is the caller's.

Invariants
    - No memory but a few buffers for each receiver is held: large extents are sent from where they are.
    - :meth:`Outgoing.to_all` returns when every receiver has everything or has failed.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from torchft.checkpointing.chunks import ByteRun, Seal, host_view
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.memory import StorageBytes
from torchft.checkpointing.pg_link import Link, message_of
from torchft.checkpointing.pg_local import LocalOffer
from torchft.checkpointing.pg_stream import ANNOUNCED, BY_GROUP, LOCALLY, Bucket, ChunkHasher, Prologue, buckets
from torchft.runtime.tracebacks import without_frames

__all__ = ["Outgoing"]


class Outgoing:
    """One state on its way.

    Args:
        prologue: that announces it.
        manifest: of the state.
        extents: the bytes of each, where they are sent from.
        run: the same, readable by the host.
        log: where to say what took how long.
        local: the state as it is served to receivers on this machine; None: it is not.
    """

    def __init__(
        self,
        prologue: Prologue,
        manifest: Manifest,
        extents: Sequence[StorageBytes],
        run: ByteRun,
        log: logging.LoggerAdapter[logging.Logger],
        local: LocalOffer | None = None,
    ) -> None:
        self._prologue = prologue
        self._manifest = manifest
        self._extents = extents
        self._run = run
        self._log = log
        self._local = local
        self._hashing = threading.Lock()
        self._hasher = ChunkHasher()
        self._hashed = 0
        self._trailer: bytes | None = None

    def to_all(self, links: dict[int, Link]) -> dict[int, Exception]:
        """Sends to each member, by replica rank; the ranks that failed, and why."""
        failed: dict[int, Exception] = {}

        def send(rank: int) -> None:
            try:
                self._to(rank, links[rank])
            except Exception as e:
                failed[rank] = without_frames(e)

        first, *others = links
        threads: list[threading.Thread] = []
        for rank in others:
            context = contextvars.copy_context()  # whoever speaks here speaks there
            name = f"torchft-send-{rank}"
            threads.append(threading.Thread(target=context.run, args=(send, rank), name=name, daemon=True))
            threads[-1].start()
        send(first)
        for thread in threads:
            thread.join()  # bounded by its link's deadline
        return {rank: failed[rank] for rank in links if rank in failed}

    def _to(self, rank: int, link: Link) -> None:
        began = time.perf_counter()
        taken = self._takes_local_way(link)
        if taken is None:
            link.send(message_of(self._manifest.body))
            link.drain()
            if self._prologue.waits:
                link.await_answer(ANNOUNCED)
        ready = time.perf_counter()
        self._log.info(
            "send manifest took %.3fs (%d bytes to replica rank %d)", ready - began, len(self._manifest.body), rank
        )
        if taken is None:
            link.apart(lambda: self._data_to(link))
        else:
            assert self._local is not None
            with link.ends_transfer():
                self._local.await_receiver(taken, rank, link.transfer)
        took = max(time.perf_counter() - ready, 1e-9)
        total = self._manifest.total
        self._log.info(
            "send tensors took %.3fs (%d bytes to replica rank %d, %.2f GB/s)", took, total, rank, total / took / 1e9
        )

    def _takes_local_way(self, link: Link) -> str | None:
        """Announces the state; the receiver's name on the local way, if it takes that."""
        if self._local is None:
            link.send(message_of(self._prologue.pack()))
            return None
        way, receiver = self._local.way()
        link.send(message_of(replace(self._prologue, way=len(way)).pack()))
        link.send(message_of(way))
        link.drain()
        return receiver if link.await_answer(LOCALLY, BY_GROUP) == LOCALLY else None

    def _data_to(self, link: Link) -> None:
        for bucket in buckets(self._manifest.extents, self._prologue.bucket):
            self._hash_to(bucket.stop)
            link.send(self._message(bucket, link.buffer))
        link.send(message_of(self._sealed()))
        link.drain()

    def _hash_to(self, stop: int) -> None:
        with self._hashing:
            if self._hashed < stop:
                self._hasher.update(self._run.views(self._hashed, stop))
                self._hashed = stop

    def _sealed(self) -> bytes:
        with self._hashing:
            if self._trailer is None:
                seal = Seal.of(self._manifest, self._hasher.finish())
                self._trailer = bytes.fromhex(seal.root) + seal.chunks
            return self._trailer

    def _message(self, bucket: Bucket, buffer: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """A message with the bytes of a bucket: the tensor's own memory, or a buffer they are gathered in."""
        length = bucket.stop - bucket.start
        if bucket.extent >= 0:
            return self._extents[bucket.extent].tensor()[bucket.offset : bucket.offset + length]
        message = buffer(length)
        gathered = message if message.device.type == "cpu" else torch.empty(length, dtype=torch.uint8)
        data = host_view(gathered)
        for view in self._run.views(bucket.start, bucket.stop):
            data[: len(view)] = view
            data = data[len(view) :]
        return message if gathered is message else message.copy_(gathered)
