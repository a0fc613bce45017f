"""State transfer over HTTP: the source serves a snapshot, the receiver fetches and verifies it.

The idea
    ``send_checkpoint`` takes a snapshot and returns; bytes are served as soon as they are copied, and hashing and
    serving go on in the background while the source trains. The receiver reads the manifest, then the data straight
    into tensors, then the hashes; bad chunks are asked for again, and a lost connection resumes where it was.

Snapshot
    ``"copy"``: the state is copied into memory that is kept for the next time; ``disallow_checkpoint`` has nothing to
    wait for, and readers that have begun may finish until the next snapshot is taken. ``"lock"``: nothing is copied;
    ``disallow_checkpoint`` waits for the readers that have begun, at most ``timeout``, and then drops them.

Abort
    Sockets of a download that runs are shut down, whatever it waits for; the source cuts off those who read now. The
    offer stays, and both go on with what comes next.

Invariants
    - At most one snapshot is held. Before its memory is written again all its readers are gone.
    - Metadata is ``torchft-http/1 http://host:port …``: anything else is refused by the receiver.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeVar, cast

from torchft import config
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.http_download import Download
from torchft.checkpointing.http_server import SnapshotServer
from torchft.checkpointing.manifest import describe
from torchft.checkpointing.snapshot import Arena, host_run
from torchft.checkpointing.transfers import Transfers
from torchft.checkpointing.transport import (
    COPY_BELOW,
    CheckpointError,
    CheckpointTimeout,
    CheckpointTransport,
)
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger
from torchft.runtime.net import advertised_host, format_address, parse_address

__all__ = ["HTTPTransport"]

T = TypeVar("T")
logger = SpeakerLogger(__name__)

_PROTOCOL = "torchft-http/1"
_DROP = 10.0


class HTTPTransport(CheckpointTransport[T]):
    """Serves and fetches live states over HTTP.

    Args:
        timeout: longest wait for readers (``snapshot="lock"``), and after which a reader that takes nothing is dropped.
        num_chunks: accepted for compatibility; the data is always cut into chunks of 8 MiB.
        state_dict: returns the tree whose tensors are received into where path, dtype and shape match. By default
            fresh memory is used.
        snapshot: ``"copy"`` or ``"lock"``, see the module.
        hostname: the address of this machine for receivers; by default ``TORCHFT_HOST``, else the interface that
            routes to the lighthouse.
        token: readers must present it, and it is presented to sources; the same on both sides.
        allow_pickle: also send and load what the format refuses, with ``torch.save`` and
            ``torch.load(weights_only=True)``.
        port: to listen on; 0: any.
        copy_below: bytes; smaller storages are copied on both sides, see ``COPY_BELOW``.
    """

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
    ) -> None:
        if snapshot not in ("copy", "lock"):
            raise ValueError(f"snapshot={snapshot!r}: expected 'copy' or 'lock'")
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
            raise ValueError("a token is printable ASCII without spaces")
        self._timeout = timeout
        self._state_dict = state_dict
        self._snapshot = snapshot
        self._token = token
        self._allow_pickle = allow_pickle
        self.receives_in_place = state_dict is not None
        self._arena = Arena()
        self._sending = threading.Lock()
        self._copy_below = copy_below
        self._closed = False
        self._receiving = Transfers()
        self._server = SnapshotServer(token, stall=timeout.total_seconds(), port=port)
        self._addresses = _own_addresses(hostname, self._server.port)

    def metadata(self) -> str:
        return " ".join([_PROTOCOL, *self._addresses])

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta) -> None:
        """Takes the snapshot and offers it; whoever asks for ``step`` may read it."""
        deadline = Deadline(timeout)
        started = time.perf_counter()
        with self._sending:
            if self._closed:
                raise CheckpointError("this transport was shut down")
            manifest, sources = describe(state_dict, self._allow_pickle)
            if not self._server.withdraw(Deadline(min(_DROP, deadline.remaining()))):
                raise CheckpointTimeout("the readers of the last snapshot could not be dropped in time")
            run = self._arena.reserve(sources) if self._snapshot == "copy" else host_run(sources, self._copy_below)
            offer = self._server.offer(step, manifest, run)
            if self._snapshot == "lock":
                offer.advance(run.total)
            else:
                try:
                    self._arena.fill(sources, deadline, offer.advance)
                except BaseException:
                    self._server.withdraw(Deadline(_DROP))
                    raise
        took = time.perf_counter() - started
        logger.info(
            "preparing state_dict took %.3fs (step %d for replica ranks %s, %d bytes, %.2f GB/s)",
            took,
            step,
            dst_ranks,
            manifest.total,
            manifest.total / took / 1e9,
        )

    def disallow_checkpoint(self) -> None:
        self._server.close()
        if self._snapshot == "copy":
            return
        if not self._server.wait_for_readers(Deadline(self._timeout)):
            logger.warning(
                "readers of the checkpoint were not done after %gs and are dropped, so that training goes on",
                self._timeout.total_seconds(),
            )
        if not self._server.withdraw(Deadline(_DROP)):
            raise CheckpointTimeout(f"readers of the checkpoint could not be dropped within {_DROP:g}s")

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        deadline = Deadline(timeout)
        started = time.perf_counter()
        addresses = _addresses_in(metadata)
        with (
            self._receiving.begin() as transfer,
            Download(addresses, self._token, step, deadline, transfer) as download,
        ):
            manifest = download.begin(self._allow_pickle)
            into = None if self._state_dict is None else self._state_dict()
            destination = Destination(manifest, into, in_place_from=self._copy_below)
            seal = download.run(destination.run, f"replica rank {src_rank}")
        state = destination.finish(self._allow_pickle)
        took = time.perf_counter() - started
        logger.info(
            "received step %d from replica rank %d (%s): %d bytes, %d of them in place, in %.3fs, %.2f GB/s, "
            "verified, root %s",
            step,
            src_rank,
            download.address,
            manifest.total,
            destination.bytes_in_place,
            took,
            manifest.total / took / 1e9,
            seal.root,
        )
        return cast(T, state)

    def abort(self, reason: str = "the caller gave it up") -> None:
        self._receiving.abort(reason)
        self._server.drop_readers()

    def shutdown(self, wait: bool = True) -> None:
        self._closed = True
        self._server.stop(wait, Deadline(_DROP))
        with self._sending:
            self._arena.close()


def _own_addresses(hostname: str | None, port: int) -> list[str]:
    lighthouse = config.LIGHTHOUSE.read()
    toward = None if lighthouse is None else parse_address(lighthouse.split(",")[0])
    hosts = [advertised_host(toward, hostname)]
    if not config.HOST.is_set() and hostname is None:
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError:
            pass  # nobody could be told this name
        else:
            hosts.append(name)
    return [format_address(h, port) for h in dict.fromkeys(hosts)]


def _addresses_in(metadata: str) -> list[str]:
    protocol, *addresses = metadata.split(" ")
    if protocol != _PROTOCOL:
        family = _PROTOCOL.partition("/")[0]
        spoken = protocol if protocol.startswith(f"{family}/") else f"something else ({metadata[:80]!r})"
        raise CheckpointError(
            f"the source does not speak {_PROTOCOL} but {spoken}: give all replica groups the same transport and the "
            "same version of torchft"
        )
    if not 0 < len(addresses) <= 16:
        raise CheckpointError(f"the source's metadata names no usable address: {metadata[:80]!r}")
    try:
        for address in addresses:
            parse_address(address)
    except ValueError as e:
        raise CheckpointError(f"the source's metadata names no usable address: {e}") from e
    return addresses
