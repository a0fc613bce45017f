"""The receiver's side of the HTTP transport: asks a source for a manifest and for ranges of its data.

Rules
    - Every socket belongs to a transfer, which another thread may abort: then calls on it fail at once.
    - Addresses are tried in the order given; the first that answers is used.
    - What the source answers beyond the data becomes an error that says what it said.
    - What is fetched is hashed as it arrives, piece by piece; what it should be comes right after each chunk. Judging
      is left to whoever asked.
    - From a source of this machine and user data is copied out of its memory (:mod:`torchft.checkpointing.http_lent`).
      Where that fails the connection asks for bytes from then on, and nobody is judged by it.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence

import xxhash

from torchft.checkpointing.chunks import (
    DIGEST_BYTES,
    ByteRun,
    Cut,
    Sample,
    Seal,
    open_manifest,
    read_hashes,
    read_sample,
)
from torchft.checkpointing.http_lent import LENT, NOT_TAKEN, TAKEN, Borrower, Loan, is_lent, tell_unreadable
from torchft.checkpointing.http_local import is_local, local_socket
from torchft.checkpointing.http_probe import MAX_PROBE, rate_of, sample
from torchft.checkpointing.http_wire import HASHED, BodyReader, HeadReader, WireError, content_range, set_timeout
from torchft.checkpointing.manifest import MAX_MANIFEST_BYTES
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTimeout,
    IntegrityError,
    ManifestError,
    SourceLost,
    StepNotServed,
    Unauthorized,
)
from torchft.runtime.deadline import Deadline
from torchft.runtime.net import parse_address
from torchft.runtime.tracebacks import without_frames

logger = logging.getLogger("torchft.checkpointing.http_transport")

__all__ = ["ChunksGone", "Landed", "OneOffer", "SourceBusy", "SourceConnection"]

Landed = Callable[[int, bytes, bytes], None]
"""A chunk's index, the hash of what came, the hash that was announced."""
_CONNECT = 5.0
_MAX_DOCUMENT = MAX_MANIFEST_BYTES + (1 << 20)
_MAX_SAMPLE_DOCUMENT = 4096
_MAX_TEXT = 4096
_STATUS = re.compile(r"[1-5][0-9]{2}")
_SECONDS = re.compile(r"[0-9]{1,4}")
_LEAST_PAUSE = 0.5
"""Seconds after which a source that is busy is asked again at the soonest, whatever it says."""
_LENGTH = re.compile(r"[0-9]{1,19}")


class ChunksGone(StepNotServed):
    """The source still serves the step, but not these chunks: it had sent them before it went on."""


class SourceBusy(CheckpointError):
    """The source has no place for this reader now, which is to come again after so many seconds."""

    def __init__(self, message: str, pause: float = 1.0) -> None:
        super().__init__(message)
        self.pause = pause


class OneOffer:
    """What all connections to a source are to read: which of its offers of the step the first answer was of."""

    def __init__(self) -> None:
        self._name: str | None = None

    def check(self, headers: dict[str, str], address: str, step: int) -> None:
        """
        Raises:
            IntegrityError: this answer is of another one.
        """
        name = headers.get("offer", "")  # a source of an older version does not tell it
        if self._name is None:
            self._name = name
        elif self._name != name:
            raise IntegrityError(f"the source {address} replaced its state of step {step} while it was read: try again")


class SourceConnection:
    """One keep-alive connection to a source, open until :meth:`close`.

    Args:
        addresses: ``http://host:port`` or ``unix:@name``, all of the same source.
        token: sent if not None.
        deadline: until when all of it must be done.
        transfer: that the connection is for.
        receiver: what the source is to know this receiver by, on all its connections.
        offered: shared by all connections to the source that read one state.

    Raises:
        SourceLost: none of the addresses answers.
        TransferAborted: the transfer was.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        token: str | None,
        deadline: Deadline,
        transfer: Transfer,
        receiver: str,
        offered: OneOffer | None = None,
    ) -> None:
        self._deadline = deadline
        self._receiver = receiver
        self._offered = offered or OneOffer()
        self.received = 0
        """Bytes of data so far."""
        self.borrowed = 0
        """Those of them that were copied out of the source's memory."""
        self._token = token
        self._transfer = transfer
        self._sock, self.address = _connect(addresses, deadline, transfer)
        self._borrower = Borrower.of(self._sock)
        self._cut = False
        self._reader = HeadReader(self._sock)
        self._body = BodyReader(self._sock, self._reader, deadline)

    def cut(self) -> None:
        """Makes every call on it fail now, from any thread."""
        self._cut = True
        self._transfer.cut(self._sock)

    def close(self) -> None:
        self._transfer.close(self._sock)

    def manifest(self, step: int) -> tuple[Cut, bytes]:
        """Waits until the source offers ``step``, and reads how its data is cut and the manifest's body.

        Raises:
            SourceBusy, Unauthorized, StepNotServed, SourceLost, ManifestError, IntegrityError, CheckpointTimeout
        """
        served, cut, body = open_manifest(self._document(step, "manifest"))
        self._check_step(served, step)
        return cut, body

    def hashes(self, step: int) -> Seal:
        """Waits until the source has hashed the state, and reads the hashes.

        Raises:
            StepNotServed, SourceLost, ManifestError, IntegrityError, CheckpointTimeout
        """
        served, seal = read_hashes(self._document(step, "hashes"))
        self._check_step(served, step)
        return seal

    def hashes_of(self, step: int, indices: Sequence[int]) -> Sample:
        """Waits until the source offers the state, and reads the hashes of some chunks.

        Args:
            step: whose.
            indices: ascending, at most ``MAX_SAMPLE``.

        Raises:
            StepNotServed: also where the source is of a version that has no such request.
            SourceLost, ManifestError, CheckpointTimeout
        """
        name = f"hashes?chunks={','.join(map(str, indices))}"
        served, told = read_sample(self._document(step, name, _MAX_SAMPLE_DOCUMENT), indices)
        self._check_step(served, step)
        return told

    def fetch(self, step: int, cut: Cut, run: ByteRun, first: int, last: int, landed: Landed) -> None:
        """Receives chunks ``first`` to ``last`` (not included) into ``run``.

        Args:
            step: whose data.
            cut: how it is cut.
            run: where to.
            first: index of a chunk.
            last: end.
            landed: told each chunk's index when all its bytes are written, the hash that they have, and the one that
                the source announced.

        Raises:
            StepNotServed, SourceLost, CheckpointTimeout
        """
        while first < last:  # what cannot be read where it is, is asked for once more
            first = self._fetch(step, cut, run, first, last, landed)

    def _fetch(self, step: int, cut: Cut, run: ByteRun, first: int, last: int, landed: Landed) -> int:
        """Returns the first chunk that has not come."""
        start, stop = cut.span(first)[0], cut.span(last - 1)[1]
        fields = {"Range": f"bytes={start}-{stop - 1}", "Accept": HASHED, **self._patience()}
        if self._borrower is not None:
            fields["Prefer"] += ", lend"
        status, headers, length = self._ask(f"/checkpoint/{step}/data", fields)
        if status != 206:
            raise self._refusal(status, headers, length, step)
        self._offered.check(headers, self.address, step)
        whole = stop - start + DIGEST_BYTES * (last - first)
        kind = headers.get("content-type")
        lent = kind == LENT and self._borrower is not None and is_lent(length, last - first)
        if not lent and (kind != HASHED or length != whole):
            raise CheckpointError(
                f"the source {self.address} answered {kind!r}, {length} bytes, where {HASHED}, "
                f"{whole} bytes, was asked for: run the same torchft on both sides"
            )
        if content_range(headers.get("content-range", "")) != (start, stop):
            raise CheckpointError(f"the source {self.address} answered with another range than it was asked for")
        if lent:
            return self._borrow(cut, run, first, last, length, landed)
        announced = bytearray(DIGEST_BYTES)
        for index in range(first, last):
            hasher = xxhash.xxh3_128()

            def arrived(piece: memoryview, hasher: xxhash.xxh3_128 = hasher) -> None:
                hasher.update(piece)
                self.received += len(piece)

            self._receive(run.views(*cut.span(index)), arrived)
            self._receive([memoryview(announced)])
            landed(index, hasher.digest(), bytes(announced))
        return last

    def _borrow(self, cut: Cut, run: ByteRun, first: int, last: int, length: int, landed: Landed) -> int:
        """Copies chunks out of the source's memory. Returns the first one that could not be had that way."""
        data = bytearray(length - DIGEST_BYTES * (last - first))
        self._receive([memoryview(data)])
        loan = Loan(data, cut.span(last - 1)[1] - cut.span(first)[0])
        announced, end = bytearray(DIGEST_BYTES), first
        for index in range(first, last):
            self._receive([memoryview(announced)])  # all of them: after one that failed the source is only heard out
            taken = end == index and self._take(loan, run.views(*cut.span(index)), announced)
            self._answer(TAKEN if taken else NOT_TAKEN)
            if taken:
                end = index + 1
                landed(index, bytes(announced), bytes(announced))
        if end < last:
            self._borrower = None
        return end

    def _take(self, loan: Loan, views: Sequence[memoryview], announced: bytearray) -> bool:
        """Whether the next chunk of a loan could be read, and is what it is to be."""
        assert self._borrower is not None
        try:
            if self._borrower.copy(loan, views, self._copied) == announced:
                return True
        except CheckpointError:  # a timeout of ours is an OSError too
            raise
        except OSError as e:
            tell_unreadable(e)
        else:
            logger.info(
                "the memory of the source %s is not what it offered any more: its bytes are asked for", self.address
            )
        return False

    def _copied(self, count: int) -> None:
        self.received += count
        self.borrowed += count
        if self._cut or self._transfer.over:
            raise self._lost(WireError("the connection was given up"))
        if self._deadline.expired:
            raise self._late()

    def _answer(self, said: bytes) -> None:
        try:
            set_timeout(self._sock, self._deadline)
            self._sock.sendall(said)
        except TimeoutError as e:
            raise self._late() from e
        except OSError as e:
            raise self._lost(e) from e

    def probe(self, nbytes: int = MAX_PROBE) -> float:
        """Bytes a second that come from this source now; takes about a second at most.

        Raises:
            SourceLost, CheckpointError
        """
        status, _, length = self._ask(f"/probe/{nbytes}", {})
        if status != 200 or length != nbytes:
            raise CheckpointError(f"the source {self.address} cannot be measured: it answered {status}, {length} bytes")
        try:
            return rate_of(sample(self._sock, self._reader, length))
        except OSError as e:
            raise self._lost(e) from e

    def _document(self, step: int, name: str, most: int = _MAX_DOCUMENT) -> bytearray:
        status, headers, length = self._ask(f"/checkpoint/{step}/{name}", self._patience())
        if status != 200:
            raise self._refusal(status, headers, length, step)
        self._offered.check(headers, self.address, step)
        if length > most:
            raise ManifestError(f"the source {self.address} announces {length} bytes of {name}")
        document = bytearray(length)
        self._receive([memoryview(document)])
        return document

    def _check_step(self, served: int, step: int) -> None:
        if served != step:
            raise StepNotServed(f"step {step} was asked for, but {self.address} answered with step {served}")

    def _patience(self) -> dict[str, str]:
        """How long the source may hold a request."""
        return {"Prefer": f"wait={self._deadline.remaining_to_answer():.3f}"}

    def _ask(self, target: str, fields: dict[str, str]) -> tuple[int, dict[str, str], int]:
        lines = [
            f"GET {target} HTTP/1.1",
            f"Host: {'localhost' if is_local(self.address) else self.address.removeprefix('http://')}",
        ]
        lines += [f"{k}: {v}" for k, v in {"Receiver": self._receiver, **fields}.items()]
        if self._token is not None:
            lines.append(f"Authorization: Bearer {self._token}")
        try:
            set_timeout(self._sock, self._deadline)
            self._sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            head = self._reader.head(self._deadline)
        except TimeoutError as e:
            raise self._late() from e
        except OSError as e:
            raise self._lost(e) from e
        if head is None:
            raise self._lost(WireError("it closed the connection"))
        line, headers = head
        parts = line.split(" ", 2)
        length = headers.get("content-length", "")
        if (
            len(parts) < 2
            or not parts[0].startswith("HTTP/1.")
            or not _STATUS.fullmatch(parts[1])
            or not _LENGTH.fullmatch(length)
        ):
            raise CheckpointError(f"{self.address} does not speak HTTP/1.1 as torchft does: {line[:60]!r}")
        return int(parts[1]), headers, int(length)

    def _receive(self, views: Sequence[memoryview], arrived: Callable[[memoryview], object] | None = None) -> None:
        try:
            self._body.fill(views, arrived)
        except TimeoutError as e:
            raise self._late() from e
        except OSError as e:
            raise self._lost(e) from e

    def _refusal(self, status: int, headers: dict[str, str], length: int, step: int) -> CheckpointError:
        text = bytearray(min(length, _MAX_TEXT))
        self._receive([memoryview(text)])
        said = text.decode("utf-8", "replace").strip()
        if status == 401:
            return Unauthorized(f"the source {self.address} refuses this receiver: {said}")
        if status == 410:
            return ChunksGone(f"the source {self.address} went on before this receiver had all of step {step}: {said}")
        if status in (404, 409, 412):
            return StepNotServed(f"the source {self.address} does not serve what was asked for: {said}")
        if status == 503:
            told = headers.get("retry-after", "")
            pause = max(_LEAST_PAUSE, float(told) if _SECONDS.fullmatch(told) else 0.0)
            if pause >= self._deadline.remaining():
                return CheckpointTimeout(f"the source {self.address} was not ready with step {step} in time: {said}")
            if told:
                return SourceBusy(f"the source {self.address} is busy: {said}", pause)
        return CheckpointError(f"the source {self.address} answered {status}: {said}")

    def _late(self) -> CheckpointTimeout:
        return CheckpointTimeout(
            f"the source {self.address} did not deliver within {self._deadline.timeout:g}s: it is slow or hangs; "
            "a longer timeout allows for a larger state"
        )

    def _lost(self, cause: OSError) -> SourceLost:
        return SourceLost(f"the source {self.address} was lost: {cause}")


def _connect(addresses: Sequence[str], deadline: Deadline, transfer: Transfer) -> tuple[socket.socket, str]:
    failures: list[str] = []
    for address in addresses:
        limit = min(_CONNECT, deadline.remaining())
        if limit <= 0:
            failures.append(f"{address}: no time left")
            continue
        try:
            return _connect_to(address, limit, transfer), address
        except OSError as e:
            if not is_local(address) or len(addresses) == 1:  # most sources are on other machines
                failures.append(f"{address}: {e}")
    kind = CheckpointTimeout if deadline.expired else SourceLost
    raise kind(
        f"the source cannot be reached ({'; '.join(failures)}): is it alive, and is its address one that "
        "this machine reaches? TORCHFT_HOST at the source sets it"
    )


def _connect_to(address: str, limit: float, transfer: Transfer) -> socket.socket:
    failure: OSError | None = None
    for sock, target in _sockets(address):
        try:
            transfer.connect(sock, target, limit)
        except BaseException as e:
            transfer.close(sock)
            transfer.check()
            if not isinstance(e, OSError):
                raise
            failure = without_frames(e)
        else:
            if not is_local(address):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    try:
        raise failure or OSError("its name has no address")
    finally:
        del failure


def _sockets(address: str) -> Iterator[tuple[socket.socket, object]]:
    """One after another, the sockets that may lead there, and what their ``connect`` takes."""
    if is_local(address):
        yield local_socket(address)
        return
    host, _, port = parse_address(address).rpartition(":")
    for family, kind, protocol, _, target in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
        yield socket.socket(family, kind, protocol), target
