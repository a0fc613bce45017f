"""One state, fetched over HTTP from one source and verified.

The data is asked for at once and hashed chunk by chunk; if there are many, in a thread beside the one that receives.
When all of it is there the source's hashes are read. Chunks that do not have the announced hash are asked for again; a
connection that is lost is made anew and goes on with the chunks that are missing. Both end after ``ATTEMPTS`` failures,
and with the abort of the transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torchft.checkpointing.chunks import ByteRun, Cut, Seal, digest
from torchft.checkpointing.http_client import SourceConnection
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import IntegrityError, SourceLost
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import SpeakerLogger

__all__ = ["Download"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

ATTEMPTS = 3


class Download:
    """A context manager: leaving it closes the connection.

    Args:
        addresses: of the source.
        token: presented to it if not None.
        step: of the state.
        deadline: until when all must be done.
        transfer: that this is.

    Raises:
        SourceLost: it cannot be reached.
        TransferAborted: the transfer was.
    """

    def __init__(
        self, addresses: Sequence[str], token: str | None, step: int, deadline: Deadline, transfer: Transfer
    ) -> None:
        self._addresses = addresses
        self._token = token
        self._step = step
        self._deadline = deadline
        self._failures = 0
        self._cut = Cut(0)
        self._transfer = transfer
        self._connection = SourceConnection(addresses, token, deadline, transfer)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="torchft-http-verify")

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._hasher.shutdown(wait=True, cancel_futures=True)

    @property
    def address(self) -> str:
        """The source's address that answered."""
        return self._connection.address

    def begin(self, allow_pickle: bool) -> Manifest:
        """Waits for the step to be offered; what will arrive."""
        manifest, self._cut = self._connection.manifest(self._step, allow_pickle)
        self._body = digest([memoryview(manifest.body)])
        return manifest

    def run(self, run: ByteRun, source: str) -> Seal:
        """Receives the data into ``run``; returns when all of it is verified.

        Args:
            run: memory for what ``begin`` announced.
            source: for messages.

        Raises:
            IntegrityError: it is not what the source announces.
            SourceLost, StepNotServed, CheckpointTimeout, TransferAborted
        """
        digests: dict[int, Future[bytes]] = {}
        seal: Seal | None = None

        def landed(index: int, computed: bytes | None) -> None:
            if computed is None:
                digests[index] = self._hasher.submit(digest, run.views(*self._cut.span(index)))
            else:
                digests[index] = Future()
                digests[index].set_result(computed)

        while True:
            try:
                for first, last in _missing(self._cut.count, digests):
                    self._connection.fetch(
                        self._step, self._cut, run, first, last, landed, None if seal is None else seal.root
                    )
                seal = self._connection.hashes(self._step)
            except SourceLost as e:
                self._transfer.check()
                self._failures += 1
                if self._failures == ATTEMPTS:
                    raise
                logger.warning("%s; going on where it stopped, if it answers again", e)
                self._connection.close()
                self._connection = SourceConnection(self._addresses, self._token, self._deadline, self._transfer)
                continue
            if seal.body != self._body or seal.cut != self._cut:
                raise IntegrityError(f"{source} replaced its state of step {self._step} while it was read: try again")
            bad = [i for i, computed in digests.items() if computed.result() != seal.digest_of(i)]
            if not bad:
                return seal
            self._failures += 1
            if self._failures == ATTEMPTS:
                raise IntegrityError(
                    f"chunk {bad[0]} of step {self._step} from {source} ({self.address}) does not have the announced "
                    f"hash, {ATTEMPTS} times: the memory of one of the machines or the network in between corrupts data"
                )
            logger.warning("chunks %s from %s do not have the announced hash and are asked for again", bad[:8], source)
            for index in bad:
                del digests[index]


def _missing(count: int, have: dict[int, Future[bytes]]) -> list[tuple[int, int]]:
    """Runs of chunks that are missing: first and end of each."""
    runs: list[tuple[int, int]] = []
    for index in range(count):
        if index not in have:
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
    return runs
