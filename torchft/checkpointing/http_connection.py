"""One reader's connection to a source, and the requests it may make.

Requests
    - ``GET /checkpoint/{step}/manifest``, as soon as the snapshot is begun.
    - ``GET /checkpoint/{step}/data`` with ``Range: bytes=a-b``, sent as fast as it is copied. With ``Accept:
      application/x-torchft-hashed`` the range must consist of whole chunks, and the body has the 16 bytes of each
      chunk's hash right after the chunk: it is hashed as it is sent. With ``Prefer: lend`` besides, a process of this
      machine and user gets the loan of the memory where that is, if it can be (:mod:`torchft.checkpointing.http_lent`).
    - ``GET /checkpoint/{step}/hashes``, when all is hashed; asking makes the source hash what it has not yet.
    - ``GET /checkpoint/{step}/hashes?chunks=3,17,40``: the hashes of these chunks and of the manifest's body, at once.
      Indices ascend, ``MAX_SAMPLE`` of them at most (400 otherwise); those that the state does not have are passed
      over. Who has asked for hashes alone compares, and is not waited for: it is cut off when the memory is wanted.
    - ``GET /probe/{bytes}``, at any time: bytes that mean nothing (:mod:`torchft.checkpointing.http_probe`).

    Once all is hashed answers carry ``ETag: "root"``; ``If-Match: "root"`` has it hashed and is checked. 401 without
    the token where one is set; 404 for a step that is not offered (any more, or yet), 409 for a step older than what
    was offered, 410 for chunks that are not held any more, 412 for another root, 416 for an impossible range, 503 while
    the hashes are not there. ``Prefer: wait=seconds`` lets the server hold the request that long instead of answering
    404 or 503 at once. ``Receiver: name`` says which connections belong together.

    A source whose places are all taken answers a request that waits for a step with 503, ``Retry-After`` and
    ``Connection: close``: the reader comes again.

Rules
    - A connection has no thread of its own: :mod:`torchft.checkpointing.http_porter` gives it one for a request that
      can be answered. What is asked for and is not there yet is put aside (:class:`NotYet`) and served later.
    - No call on the socket takes longer than ``_TICK``: the memory can be had back soon.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torchft.checkpointing.http_body import Body, LentBody
from torchft.checkpointing.http_lent import LENT, own_process
from torchft.checkpointing.http_probe import MAX_PROBE, noise
from torchft.checkpointing.http_wire import (
    HASHED,
    MAX_SAMPLE,
    HeadReader,
    limit_calls,
    parse_indices,
    parse_range,
    send_views,
)
from torchft.checkpointing.offer import Gone, Offer
from torchft.checkpointing.transfers import shut_down
from torchft.runtime.deadline import Deadline
from torchft.runtime.loopback import unpace

if TYPE_CHECKING:
    from torchft.checkpointing.http_server import SnapshotServer

__all__ = ["Connection", "NotYet", "Refused"]

logger = logging.getLogger("torchft.checkpointing.http_transport")

_MAX_WAIT = 3600.0
_TICK = 0.02
_PATH = re.compile(r"/checkpoint/(\d{1,18})/(manifest|data|hashes(?:\?chunks=(.*))?)")
_PROBE = re.compile(r"/probe/(\d{1,18})")
_LEND = re.compile(r"(?:^|,) *lend *(?:,|$)")
_WAIT = re.compile(r"wait=(\d{1,9}(?:\.\d{1,6})?)")
_REASONS = {
    200: "OK",
    206: "Partial Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Refused(Exception):
    """What is asked for is not to be had. The message is for the reader."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NotYet(Exception):
    """What is asked for may be there later. The request is kept."""


@dataclass(frozen=True)
class _Request:
    method: str
    target: str
    headers: dict[str, str]
    step: int
    """-1: of no state."""
    document: str
    indices: list[int] | None
    """Of the chunks whose hashes are asked for, where that are not all."""
    deadline: Deadline
    """Until when it is to be answered."""
    hold: Deadline
    """Until when the source may hold it for a step that is not there yet."""


class Connection:
    """One reader's connection.

    Args:
        server: whose.
        sock: accepted.
        peer: who is at the other end; no two have the same name.
    """

    def __init__(self, server: SnapshotServer, sock: socket.socket, peer: str) -> None:
        self._server = server
        self._sock = sock
        self._peer = peer
        self._reader = HeadReader(sock)
        self._request: _Request | None = None
        self._greeted = False
        self.dropped = False
        self.comparing = True
        self.receiver = peer
        self.lease = threading.Lock()

    def __str__(self) -> str:
        return self._peer

    def fileno(self) -> int:
        return self._sock.fileno()

    def cut(self) -> None:
        """Makes every call on the socket fail now. The server's lock is held: the socket is not closed meanwhile."""
        self.dropped = True
        shut_down(self._sock)

    def gone(self) -> bool:
        """Whether the other end has closed it, which who only sends does not see. Under the server's lock, as above."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._sock.close()

    def listen(self) -> bool:
        """Takes what has come, without waiting: whether there is a request to :meth:`serve`.

        Raises:
            OSError: the other end closed it.
        """
        return self._reader.listen()

    @property
    def asks(self) -> bool:
        """There is a request to serve."""
        return self._request is not None or self._reader.ready

    @property
    def waits_for(self) -> tuple[int, Deadline] | None:
        """The step that is not there yet, and until when the request waits for it."""
        return None if self._request is None else (self._request.step, self._request.hold)

    def await_request(self, limit: float) -> bool:
        """Whether a further request comes within so many seconds.

        Raises:
            OSError: the other end closed it.
        """
        if self._reader.ready:
            return True
        limit_calls(self._sock, limit)
        try:
            data = self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return bool(data) and self.listen()

    def tell_busy(self) -> None:
        """Asks the reader to come again, and does not wait for it. It is to be closed then."""
        text = b"this source serves as many readers as it can\n"
        fields = {"Retry-After": "1", "Connection": "close", "Content-Type": "text/plain"}
        try:
            self._sock.send(_head(503, fields, len(text)) + text, socket.MSG_DONTWAIT)
        except OSError as e:
            logger.debug("checkpoint reader %s was not told that there is no place: %s", self._peer, e)

    def serve(self) -> bool:
        """Answers the request that is there; whether further ones may follow.

        Raises:
            NotYet: it cannot be answered yet.
            OSError, TimeoutError, Withdrawn, Gone: the connection has to end.
        """
        if not self._greeted:
            self._greeted = True
            if self._sock.family in (socket.AF_INET, socket.AF_INET6):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                unpace(self._sock)
        limit_calls(self._sock, _TICK)
        request = self._request
        try:
            if request is None:
                request = self._read()
            self._answer_to(request)
        except NotYet:
            self._request = request
            raise
        except Refused as e:
            self._answer(e.status, {"Retry-After": "1"} if e.status == 503 else {}, f"{e}\n".encode())
        self._request = None
        self._server.answered(self)
        return request is not None and request.headers.get("connection", "").lower() != "close"

    def _read(self) -> _Request:
        """The request that has come.

        Raises:
            Refused: it is none that is served.
        """
        head = self._reader.head(Deadline(_TICK))
        assert head is not None
        line, headers = head
        try:
            method, target, version = line.split(" ")
        except ValueError:
            raise Refused(400, "not HTTP") from None
        if version != "HTTP/1.1" or headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            raise Refused(400, "HTTP/1.1 requests without a body are served")
        path = _PATH.fullmatch(target)
        wait = _WAIT.search(headers.get("prefer", ""))
        deadline = Deadline(min(float(wait[1]) if wait else 0.0, _MAX_WAIT))
        if path is None:
            return _Request(method, target, headers, -1, "", None, deadline, deadline)
        indices = None if path[3] is None else parse_indices(path[3])
        if path[3] is not None and indices is None:
            raise Refused(400, f"chunks= takes at most {MAX_SAMPLE} indices, ascending, with commas between")
        step = int(path[1])
        hold = Deadline(min(deadline.timeout, self._server.patience(step)))
        return _Request(method, target, headers, step, path[2], indices, deadline, hold)

    def _answer_to(self, request: _Request) -> None:
        if request.method not in ("GET", "HEAD"):
            raise Refused(405, "GET is served")
        if not self._server.allows(request.headers):
            given = "another one was" if "authorization" in request.headers else "none was"
            raise Refused(
                401,
                f"this source asks for a token, and {given} given: set TORCHFT_TOKEN to the same text in all groups, "
                "or give all their transports the same token=",
            )
        if (probe := _PROBE.fullmatch(request.target)) is not None:
            self._probe(int(probe[1]), request.method)
            return
        if request.step < 0:
            raise Refused(404, "GET /checkpoint/{step}/manifest, /checkpoint/{step}/data or /checkpoint/{step}/hashes")
        self.receiver = request.headers.get("receiver", self._peer)[:64]
        if request.document in ("manifest", "data"):
            self.comparing = False
        offer = self._server.find(request.step, self, request.hold)
        send_body = None
        try:
            if request.document == "manifest":
                self._document(offer, offer.document, request.method)
            elif request.indices is not None:
                self._sample(offer, request.indices, request.method, request.deadline)
            elif request.document == "hashes":
                if offer.await_seal(request.deadline, self) is None:
                    raise Refused(503, f"the snapshot of step {offer.step} is being hashed")
                self._document(offer, offer.hashes, request.method)
            else:
                send_body = self._data(offer, request.headers, request.method, request.deadline)
        except Gone as e:
            raise Refused(410, str(e)) from e
        if send_body is not None:
            send_body()  # what is gone by now only the connection's end can tell

    def _probe(self, nbytes: int, method: str) -> None:
        if nbytes > MAX_PROBE:
            raise Refused(416, f"a probe has at most {MAX_PROBE} bytes")
        head = _head(200, {"Content-Type": "application/octet-stream"}, nbytes)
        body = noise(nbytes) if method == "GET" else []
        send_views(self._sock, [memoryview(head), *body], self._server.stall)

    def _document(self, offer: Offer, document: bytes, method: str) -> None:
        fields = {**_names(offer), "Content-Type": "application/json"}
        views = [memoryview(_head(200, fields, len(document))), memoryview(document)]
        send_views(self._sock, views if method == "GET" else views[:1], self._server.stall)

    def _sample(self, offer: Offer, indices: list[int], method: str, deadline: Deadline) -> None:
        try:
            document = offer.sample(indices, deadline, self)
        except TimeoutError as e:
            raise Refused(503, f"the snapshot of step {offer.step} is being made: {e}") from e
        self._document(offer, document, method)

    def _data(
        self, offer: Offer, headers: dict[str, str], method: str, deadline: Deadline
    ) -> Callable[[], None] | None:
        """Sends the head; what sends the body, where there is one."""
        if "if-match" in headers:
            if offer.await_seal(deadline, self) is None:
                raise Refused(503, f"the snapshot of step {offer.step} is being hashed")
            if headers["if-match"] not in ("*", _names(offer)["ETag"]):
                raise Refused(412, f"the root of step {offer.step} is {_names(offer)['ETag']}")
        cut = offer.cut
        start, stop, status = 0, cut.total, 200
        fields = {**_names(offer), "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "range" in headers:
            span = parse_range(headers["range"], cut.total)
            if span is None:
                self._answer(416, {"Content-Range": f"bytes */{cut.total}"}, b"no such range\n")
                return None
            start, stop, status = *span, 206
            fields["Content-Range"] = f"bytes {start}-{stop - 1}/{cut.total}"
        hashed = headers.get("accept") == HASHED
        first, last = start // cut.chunk_size, -(-stop // cut.chunk_size)
        length = stop - start
        if hashed:
            if start != cut.span(first)[0] or (stop > start and stop != cut.span(last - 1)[1]):
                raise Refused(416, f"hashes come with whole chunks of {cut.chunk_size} bytes")
            fields["Content-Type"] = HASHED
            length += 16 * (last - first)
        offer.check_held(first, last)
        borrows = hashed and method == "GET" and _LEND.search(headers.get("prefer", "")) is not None
        if borrows and first < last and self._server.lends and own_process(self._sock) is not None:
            lent = LentBody(self._sock, self, self._reader, offer, self._server.stall, first, last)
            if lent.possible:
                fields["Content-Type"] = LENT
                send_views(self._sock, [memoryview(_head(status, fields, lent.length))], self._server.stall)
                return lent.send
        send_views(self._sock, [memoryview(_head(status, fields, length))], self._server.stall)
        if method == "GET":
            return partial(Body(self._sock, self, offer, self._server.stall).send, start, stop, hashed)
        return None

    def _answer(self, status: int, fields: dict[str, str], body: bytes) -> None:
        head = _head(status, {**fields, "Content-Type": "text/plain"}, len(body))
        send_views(self._sock, [memoryview(head + body)], self._server.stall)


def _names(offer: Offer) -> dict[str, str]:
    etag = {} if offer.seal is None else {"ETag": f'"{offer.seal.root}"'}
    return {"Offer": offer.name, **etag}


def _head(status: int, fields: dict[str, str], length: int) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{k}: {v}" for k, v in fields.items())]
    return ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\n").encode("latin-1")
