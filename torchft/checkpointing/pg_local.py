"""Between two processes of one machine the data of a process-group transfer goes over a Unix socket.

The idea
    Gloo moves all messages between two members over one connection, from one thread, and over TCP. On one machine there
    is a better way, which HTTP has already (:mod:`torchft.checkpointing.http_local`): the source serves the state under
    a name that only its machine knows, says so over the group, and the receiver fetches and verifies it as any receiver
    of HTTP does, by :class:`Download`. A receiver elsewhere is refused at once by its own kernel, and gets the state
    over the group.

Rules
    - The source listens while it sends, and at no other time. Who reads presents a token that was drawn for this state
      and told over the group.
    - A receiver says that it takes this way when the source has answered it there, so the source knows its connection
      and sees it end, however the receiver ends.
    - What ends the transfer, or the works of the group, ends this way too, at both ends.

Invariants
    - When :meth:`LocalOffer.close` has returned, nobody reads the state's memory.
    - When the download is closed, nothing is written into the receiver's memory.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from torchft.checkpointing.chunks import ByteRun
from torchft.checkpointing.http_download import Download
from torchft.checkpointing.http_local import is_local
from torchft.checkpointing.http_server import SnapshotServer
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import CheckpointError, CheckpointTimeout, ManifestError
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["LocalOffer", "LocalWay", "local_offer"]

logger = SpeakerLogger("torchft.checkpointing.pg_transport")

_WAY = re.compile(r"(\S+) ([0-9a-f]{32}) ([0-9a-f]{32})")
_END = 10.0


class LocalOffer:
    """What a source serves to receivers on its machine, until :meth:`close`.

    Args:
        step: of the state.
        manifest: of the state.
        run: its bytes.
        deadline: of the sending.

    Raises:
        OSError: this system has no such addresses.
    """

    def __init__(self, step: int, manifest: Manifest, run: ByteRun, deadline: Deadline) -> None:
        self._token = secrets.token_hex(16)
        self._deadline = deadline
        self._server = SnapshotServer(self._token, stall=deadline.timeout, port=None)
        self._offer = self._server.offer(step, manifest)
        self._offer.supply(run)
        self._offer.advance(manifest.total)

    def way(self) -> tuple[bytes, str]:
        """What one receiver is to be told, and the name that it has here."""
        receiver = secrets.token_hex(16)
        return f"{self._server.local_address} {self._token} {receiver}".encode(), receiver

    def await_receiver(self, receiver: str, rank: int, transfer: Transfer) -> None:
        """Returns when a receiver that takes this way has everything.

        Args:
            receiver: its name here.
            rank: for messages.
            transfer: whose abort ends the wait.

        Raises:
            TransferAborted: the transfer was.
            CheckpointTimeout: the deadline passed.
            CheckpointError: the receiver gave up, or died.
        """
        transfer.listen(self._server.stir)
        try:
            ended = self._server.wait_for_receiver(receiver, self._deadline, lambda: transfer.aborted)
        finally:
            transfer.leave(self._server.stir)
        transfer.check()
        if self._offer.was_sent(receiver):
            return
        if not ended:
            raise CheckpointTimeout(
                f"replica rank {rank} did not take the state within {self._deadline.timeout:g}s: it is slow or hangs; "
                "a longer timeout allows for a larger state"
            )
        raise CheckpointError(f"replica rank {rank}, on this machine, closed its connection: it gave up, or died")

    def close(self) -> None:
        """Cuts off who reads still."""
        self._server.stop(True, Deadline(_END))


def local_offer(step: int, manifest: Manifest, run: ByteRun, deadline: Deadline) -> LocalOffer | None:
    """A :class:`LocalOffer`; None where the system has no such addresses, or none to give."""
    try:
        return LocalOffer(step, manifest, run, deadline)
    except OSError as e:
        logger.debug("the state is not served to other processes of this machine: %s", e)
        return None


@dataclass(frozen=True, slots=True)
class LocalWay:
    """A way that a source offers to this receiver, as it was told."""

    address: str
    token: str
    receiver: str

    @classmethod
    def parse(cls, told: bytes) -> LocalWay:
        """
        Raises:
            ManifestError: it is none.
        """
        match = _WAY.fullmatch(told.decode("latin-1"))
        if match is None or not is_local(match[1]):
            raise ManifestError(f"the source offers a way that this side does not know: {told[:60]!r}")
        return cls(*match.groups())

    def download(self, rank: int, step: int, deadline: Deadline, transfer: Transfer) -> Download:
        """A fetch from there.

        Args:
            rank: of the source, for messages.
            step: of the state.
            deadline: until when all must be done.
            transfer: that this is.
        """
        source = [(f"replica rank {rank}", [self.address])]
        return Download(lambda first: source[first:], self.token, step, deadline, transfer, receiver=self.receiver)
