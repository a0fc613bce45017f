"""State transfer over HTTP: sources serve snapshots, a receiver fetches from one or several and verifies.

The idea
    ``send_checkpoint`` offers the state and returns; bytes are served, and hashed as they are sent, in the background
    while the source computes. The receiver reads the manifest, then ranges of the data straight into tensors, each
    chunk followed by its hash; what is bad, lost or slow at one source is asked of another, and what was verified
    before a fetch failed is not fetched again by the next one.

Snapshot
    ``"copy"``: the state is copied into memory that is kept for the next time, beside what the caller computes;
    ``disallow_checkpoint`` waits for the copying, and readers may finish until the next snapshot is taken. ``"lock"``:
    nothing is copied at first. ``disallow_checkpoint`` waits for readers that are about as fast as a copy; what slower
    ones have not read is copied then. Either way a slow reader costs the source the time of a copy, not its own, and
    may read on until ``disallow_checkpoint`` is called once more (a step later) or another state is offered.

Abort
    Sockets of a download that runs are shut down, whatever it waits for; the source cuts off those who read now. The
    offer stays, and both go on with what comes next.

Invariants
    - At most one snapshot is held. Before its memory is written again all its readers are gone.
    - Metadata is ``torchft-http/1 http://host:port …``: anything else is refused by the receiver.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Literal, TypeVar, cast

import torch

from torchft import config
from torchft.checkpointing import metrics
from torchft.checkpointing.chunks import Cut
from torchft.checkpointing.description import Description
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_addresses import PROTOCOL, addresses_in, named_sources, own_addresses
from torchft.checkpointing.http_client import SourceConnection
from torchft.checkpointing.http_comparison import Outvoted
from torchft.checkpointing.http_differences import Differences
from torchft.checkpointing.http_download import Download
from torchft.checkpointing.http_partial import Partial
from torchft.checkpointing.http_probe import sum_of_rates
from torchft.checkpointing.http_server import SnapshotServer
from torchft.checkpointing.live import LiveTensors, look_at
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.memory import StorageBytes
from torchft.checkpointing.offer import Offer
from torchft.checkpointing.snapshot import Arena, SideStreams, host_run
from torchft.checkpointing.transfers import Transfer, Transfers
from torchft.checkpointing.transport import (
    COPY_BELOW,
    CheckpointError,
    CheckpointTimeout,
    CheckpointTransport,
)
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.logs import SpeakerLogger
from torchft.runtime.worker import Worker

__all__ = ["HTTPTransport"]

T = TypeVar("T")
logger = SpeakerLogger(__name__)

_DROP = 10.0
_WINDOW = 0.05
_GLANCE = 0.005
_WORTH_WAITING = 1.5e9
"""Bytes a second: a copy into memory that is not there yet is hardly faster."""


class HTTPTransport(CheckpointTransport[T]):
    """Serves and fetches live states over HTTP.

    Args:
        timeout: after which a reader that takes nothing is dropped, and longest wait for a copy.
        num_chunks: accepted for compatibility; the data is always cut into chunks of 8 MiB, and that of a state of 8
            to 128 MiB into sixteen, of 1 MiB at least.
        state_dict: returns the tree whose tensors are received into where path, dtype and shape match. By default
            fresh memory is used.
        snapshot: ``"copy"`` or ``"lock"``, see the module.
        hostname: the address of this machine for receivers; by default ``TORCHFT_HOST``, else the interface that
            routes to the lighthouse.
        toward: the lighthouse's ``host:port``; by default what ``TORCHFT_LIGHTHOUSE`` says.
        token: readers must present it, and it is presented to sources; the same on both sides. The Manager's default
            transport takes ``TORCHFT_TOKEN``.
        allow_pickle: also send and load what the format refuses, with ``torch.save`` and
            ``torch.load(weights_only=True)``.
        port: to listen on; 0: any.
        copy_below: bytes; smaller storages are copied on both sides, see ``COPY_BELOW``.
        connections: to each source, of a receiver.
        local: receivers on this machine may come by a Unix socket; False: everybody by TCP, to ``hostname``.
        compare_sources: what a receiver asks of sources that it takes nothing from, to find one whose state differs.
            ``"sample"``: the hashes of 64 MiB, drawn at random, at no cost to speak of; ``"all"``: all hashes, a pass
            over its state for each source and heal; ``"none"``: nothing. By default
            ``TORCHFT_COMPARE_SOURCES``, else ``"sample"``.
    """

    takes_many_sources = True
    receives_beside_collectives = True
    measures = True
    compares = True

    def __init__(
        self,
        timeout: timedelta = timedelta(seconds=60),
        num_chunks: int = 0,
        *,
        state_dict: Callable[[], object] | None = None,
        snapshot: Literal["copy", "lock"] = "copy",
        hostname: str | None = None,
        token: str | None = None,
        allow_pickle: bool = False,
        port: int = 0,
        copy_below: int = COPY_BELOW,
        connections: int = 2,
        local: bool = True,
        compare_sources: Literal["sample", "all", "none"] | None = None,
        toward: str | None = None,
    ) -> None:
        if snapshot not in ("copy", "lock"):
            raise ValueError(f"snapshot={snapshot!r}: expected 'copy' or 'lock'")
        if compare_sources not in (None, "sample", "all", "none"):
            raise ValueError(f"compare_sources={compare_sources!r}: expected 'sample', 'all' or 'none'")
        if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
            raise ValueError("a token (token=, TORCHFT_TOKEN) is printable ASCII without spaces, and not empty")
        self._timeout = timeout
        self._state_dict = state_dict
        self._snapshot = snapshot
        self._token = token
        self._allow_pickle = allow_pickle
        self.receives_in_place = state_dict is not None
        self._connections = connections
        self._compare = compare_sources or config.COMPARE_SOURCES.read()
        self.last_receive: FetchProgress | None = None
        """How the newest receive goes, or went: bytes that were fetched, kept, bad, retries."""
        self._written = False  # by the newest receive, into live tensors
        self._partial: Partial | None = None
        self._differences = Differences()
        self._download: Download | None = None  # under way
        self._outlived: Offer | None = None  # it was offered in a step that has ended
        self._live = False  # what is offered is the caller's own memory
        self._worker: Worker | None = None
        self._fill: concurrent.futures.Future[None] | None = None
        self._arena = Arena()
        self._sending = threading.Lock()
        self._copy_below = copy_below
        self._closed = False
        self._receiving = Transfers()
        self._server = SnapshotServer(token, stall=timeout.total_seconds(), port=port, local=local)
        here = self._server.local_address
        self._addresses = [*([here] if here else []), *own_addresses(hostname, self._server.port, toward)]

    @property
    def has_written(self) -> bool:
        return self._written

    def metadata(self) -> str:
        return " ".join([PROTOCOL, *self._addresses])

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta) -> None:
        """Offers the state to whoever asks for ``step``, and begins to copy it (``snapshot="copy"``)."""
        deadline = Deadline(timeout)
        started = time.perf_counter()
        with self._sending:
            if self._closed:
                raise CheckpointError("this transport was shut down")
            self._await_fill(deadline)
            description = Description(state_dict, self._allow_pickle)
            manifest = description.manifest
            if not self._server.withdraw(Deadline(min(_DROP, deadline.remaining()))):
                raise CheckpointTimeout("the readers of the last snapshot could not be dropped in time")
            offer = self._server.offer(step, manifest)  # readers begin with the manifest
            try:
                self._supply(offer, description.extents(), deadline)
            except BaseException as e:
                self._give_up(offer, e)
                raise
        took = time.perf_counter() - started
        logger.info(
            "preparing state_dict took %.3fs (step %d for replica ranks %s, %d bytes)",
            took,
            step,
            dst_ranks,
            manifest.total,
        )

    def _supply(self, offer: Offer, extents: list[StorageBytes], deadline: Deadline) -> None:
        """The bytes of what is offered."""
        if self._snapshot == "lock":
            self._outlived = None
            self._live = any(e.on_host and e.length >= self._copy_below for e in extents)
            offer.supply(host_run(extents, self._copy_below))
            offer.advance(offer.cut.total)
        else:
            sources = [e.tensor() for e in extents]
            offer.supply(self._arena.reserve(sources))
            self._fill = self._filler().submit(partial(self._copy, offer, sources, SideStreams(sources), deadline))

    def _filler(self) -> Worker:
        if self._worker is None:
            self._worker = Worker("torchft-http-snapshot")
        return self._worker

    def _copy(self, offer: Offer, sources: list[torch.Tensor], streams: SideStreams, deadline: Deadline) -> None:
        started = time.perf_counter()
        try:
            self._arena.fill(sources, streams, deadline, offer.advance)
        except BaseException as e:
            self._give_up(offer, e)
            raise
        took = time.perf_counter() - started
        total = offer.cut.total
        logger.info("copying state_dict took %.3fs (%d bytes, %.2f GB/s)", took, total, total / took / 1e9)
        metrics.SNAPSHOT_SECONDS.inc(took)
        metrics.SNAPSHOT_BYTES.inc(total)

    def _give_up(self, offer: Offer, error: BaseException) -> None:
        """The bytes of what is offered cannot be had: readers are told why, and do not wait for them."""
        self._server.decline(offer.step, str(error) or type(error).__name__)
        self._server.withdraw(Deadline(_DROP))

    def _await_fill(self, deadline: Deadline) -> None:
        """Waits until nothing is copied any more."""
        if (fill := self._fill) is None:
            return
        try:
            fill.result(deadline.remaining())
        except concurrent.futures.TimeoutError as e:
            late = CheckpointTimeout(f"the snapshot was not copied within {deadline.timeout:g}s")
            if (offer := self._server.current) is not None:
                self._give_up(offer, late)  # the caller may write what is still being copied
            raise late from e
        finally:
            if fill.done() and self._fill is fill:  # else it is waited for the next time as well
                self._fill = None

    def disallow_checkpoint(self) -> None:
        self._await_fill(Deadline(self._timeout))
        offer = self._server.current
        if offer is None or offer is self._outlived or self._read_soon(offer):
            self._outlived = None
            self._drop()
            return
        self._outlived = offer  # who reads may finish, until the next time
        if not self._live:
            return
        self._live = False
        started = time.perf_counter()
        try:
            copied = offer.move(self._arena.lend(offer.cut.total), self._arena.copy)
        except RuntimeError as e:
            logger.warning("there is no memory for what readers have not read (%s): they are dropped", e)
            self._drop()
            return
        took = time.perf_counter() - started
        metrics.SNAPSHOT_SECONDS.inc(took)
        metrics.SNAPSHOT_BYTES.inc(copied)
        logger.info(
            "readers of step %d are slow: %d bytes that they need were copied in %.3fs, %.2f GB/s, so that training "
            "goes on",
            offer.step,
            copied,
            took,
            copied / took / 1e9,
        )

    def _drop(self) -> None:
        if not self._server.withdraw(Deadline(_DROP)):
            raise CheckpointTimeout(f"readers of the checkpoint could not be dropped within {_DROP:g}s")

    def _read_soon(self, offer: Offer) -> bool:
        """Waits for readers as long as they are about as fast as a copy would be; whether they are done."""
        if not self._live:
            return self._server.wait_for_readers(Deadline(0))
        before, window = offer.bytes_sent, Deadline(_WINDOW)
        while not self._server.wait_for_readers(Deadline(_GLANCE)):
            self._server.drop_gone()  # one that gave up is not waited for, and nothing is copied for it
            if window.expired:
                now = offer.bytes_sent
                if now - before < _WORTH_WAITING * _WINDOW:
                    return False
                before, window = now, Deadline(_WINDOW)
        return True

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        return self.recv_from_many([(src_rank, metadata)], step, timeout)

    def recv_from_many(
        self,
        sources: Sequence[tuple[int, str]],
        step: int,
        timeout: timedelta,
        *,
        allowance: timedelta | None = None,
        unmeasured: bool = False,
        alike: bool = True,
    ) -> T:
        deadline = Deadline(timeout)
        self._written = False
        addresses_in(sources[0][1])  # a source that does not speak this is an error, not one less
        outvoted: frozenset[str] = frozenset()
        limit = math.inf if allowance is None or allowance >= timeout else seconds(allowance)
        with self._receiving.begin() as whole:  # an abort between two attempts is one of both
            while True:
                try:
                    return self._receive(sources, step, deadline, limit, unmeasured, alike, outvoted, whole)
                except Outvoted as e:
                    outvoted |= e.names
                    logger.info("%s: once more, without", e)

    def _receive(
        self,
        sources: Sequence[tuple[int, str]],
        step: int,
        deadline: Deadline,
        allowance: float,
        unmeasured: bool,
        alike: bool,
        outvoted: frozenset[str],
        whole: Transfer,
    ) -> T:
        started = time.perf_counter()
        with self._receiving.begin() as transfer:
            whole.check()
            download = Download(
                lambda first: named_sources(sources[first:]),
                self._token,
                step,
                deadline,
                transfer,
                self._connections,
                allowance,
                unmeasured,
                compare=self._compare if alike else "unlike",
                outvoted=outvoted,
                differences=self._differences,
            )
            with self._under_way(download):
                download.ask()
                live = look_at(self._state_dict)
                manifest, cut = download.begin(self._allow_pickle)
                destination, kept = self._continue(manifest, cut, live())
                self._written = self._written or destination.bytes_in_place > 0
                try:
                    seal = download.run(destination.run, kept)
                except BaseException:
                    download.close()  # nothing is written any more
                    self._partial = Partial(cut, download.agreement.verified, destination)
                    raise
                finally:
                    metrics.count(download.progress)
        state = destination.finish(self._allow_pickle)
        took = time.perf_counter() - started
        metrics.RECEIVED_SECONDS.inc(took)
        logger.info(
            "received step %d from %s: %d bytes, %d of them in place, %d kept from before, %d copied out of a source's "
            "memory, in %.3fs, %.2f GB/s, verified, root %s",
            step,
            ", ".join(map(str, download.agreement.givers)) or f"replica rank {sources[0][0]}",
            manifest.total,
            destination.bytes_in_place,
            download.progress.kept,
            download.progress.borrowed,
            took,
            manifest.total / took / 1e9,
            seal.root,
        )
        return cast(T, state)

    @contextmanager
    def _under_way(self, download: Download) -> Iterator[None]:
        self._download, self.last_receive = download, download.progress
        try:
            with download:
                yield
        finally:
            self._download = None

    def _continue(self, manifest: Manifest, cut: Cut, into: LiveTensors) -> tuple[Destination, dict[int, bytes]]:
        """Memory for what comes, and which chunks are in it from an attempt that failed."""
        before, self._partial = self._partial, None
        destination = Destination(
            manifest,
            into,
            in_place_from=self._copy_below,
            before=None if before is None or before.cut != cut else before.destination,
        )
        for misfit in destination.misfits():
            logger.warning("%s", misfit)
        return destination, {} if before is None else before.still_in(destination, cut)

    def measure(self, sources: Sequence[tuple[int, str]], timeout: timedelta) -> float:
        deadline, receiver = Deadline(timeout), uuid.uuid4().hex

        with self._receiving.begin() as transfer:

            def probe(addresses: Sequence[str]) -> float:
                connection = SourceConnection(addresses, self._token, deadline, transfer, receiver)
                try:
                    return connection.probe()
                finally:
                    connection.close()

            probes = [partial(probe, addresses) for _, addresses in named_sources(sources) if addresses]
            if not probes:
                raise CheckpointError("none of the sources speaks HTTP as this transport does")
            try:
                return sum_of_rates(probes, deadline.remaining())
            finally:
                transfer.finish()

    def abort(self, reason: str = "the caller gave it up") -> None:
        self._receiving.abort(reason)
        self._server.drop_readers()

    def expect_no_offer(self, reason: str) -> None:
        download = self._download
        if download is not None:
            download.expect_no_offer(reason)

    def decline(self, step: int, reason: str, dst_ranks: Sequence[int] = ()) -> None:
        self._server.decline(step, reason)

    def shutdown(self, wait: bool = True) -> None:
        self._closed = True
        self._receiving.close(_DROP if wait else 0.0)
        self._partial = None
        self._server.stop(wait, Deadline(_DROP))
        with self._sending:
            if self._worker is not None:
                self._worker.shutdown(timeout=_DROP if wait else 0.0)
            self._arena.close()
