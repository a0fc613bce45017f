"""The source's side of the HTTP transport: serves one snapshot at a time to any number of readers.

Requests
    ``GET /checkpoint/{step}/manifest`` as soon as the snapshot is begun; ``GET /checkpoint/{step}/data`` (with ``Range:
    bytes=a-b``), sent as fast as it is copied; ``GET /checkpoint/{step}/hashes`` when all is hashed. Once it is,
    answers carry ``ETag: "root"``, and ``If-Match: "root"`` is checked. 401 without the token where one is set; 404 for
    a step that is not offered (any more, or yet), 409 for a step older than what was offered, 412 for another root, 416
    for an impossible range, 503 while the hashes are not there. ``Prefer: wait=seconds`` lets the server hold the
    request that long instead of answering 404 or 503 at once.

States of the offer
    none → *open* (``offer``) → *closed* (``close``: new readers are refused, those who have the manifest may finish) →
    *withdrawn* (``withdraw``: readers are cut off; when it returns nobody reads the memory). ``offer`` withdraws what
    was there.

Invariants
    - One thread per connection, at most ``MAX_CONNECTIONS``; all end with ``stop``.
    - A connection that has asked for a snapshot is its reader until the connection ends or asks for another step.
    - A slow or dead reader holds up nobody: a connection that takes nothing for ``stall`` seconds is closed.
"""

from __future__ import annotations

import hmac
import logging
import re
import socket
import threading

from torchft.checkpointing.chunks import CHUNK_SIZE, ByteRun
from torchft.checkpointing.http_wire import HeadReader, parse_range, send_views, set_timeout
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.offer import Offer, Withdrawn
from torchft.checkpointing.transfers import shut_down
from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children_fd

__all__ = ["SnapshotServer"]

logger = logging.getLogger("torchft.checkpointing.http_transport")

MAX_CONNECTIONS = 128
_IDLE = 60.0
_MAX_WAIT = 3600.0
_PATH = re.compile(r"/checkpoint/(\d{1,18})/(manifest|data|hashes)")
_WAIT = re.compile(r"wait=(\d{1,9}(?:\.\d{1,6})?)")
_REASONS = {
    200: "OK",
    206: "Partial Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SnapshotServer:
    """Listens from construction to :meth:`stop`.

    Args:
        token: readers must send ``Authorization: Bearer {token}``; None: anybody may read.
        stall: seconds after which a reader that takes nothing is dropped.
        port: 0: any.
    """

    def __init__(self, token: str | None = None, stall: float = 60.0, port: int = 0) -> None:
        self._token = token
        self._stall = stall
        self._changed = threading.Condition()
        self._offer: Offer | None = None
        self._newest = -1
        self._stopping = False
        self._connections: set[_Connection] = set()
        self._sealers: set[threading.Thread] = set()
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        close_in_children_fd(self._listener)
        self._acceptor = threading.Thread(target=self._accept, name="torchft-http-accept", daemon=True)
        self._acceptor.start()

    def offer(self, step: int, manifest: Manifest, run: ByteRun) -> Offer:
        """Serves a snapshot, as far as it is told to ``advance``, and hashes it in the background.

        The one before must have been withdrawn.
        """
        offer = Offer(step, manifest, run, self._changed)
        sealer = threading.Thread(target=self._seal, args=(offer,), name="torchft-http-hash", daemon=True)
        with self._changed:
            self._offer = offer
            self._newest = max(self._newest, step)
            self._sealers.add(sealer)
            sealer.start()
            self._changed.notify_all()
        return offer

    def close(self) -> None:
        """Refuses new readers."""
        with self._changed:
            if self._offer is not None:
                self._offer.open = False
                self._changed.notify_all()

    def wait_for_readers(self, deadline: Deadline) -> bool:
        """Whether all readers of the offer have ended before the deadline. It may still be being hashed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._offer is None or not self._offer.readers, deadline.remaining())

    def drop_readers(self) -> None:
        """Cuts off those who read now. The offer stays as it is; returns at once."""
        with self._changed:
            for reader in () if self._offer is None else self._offer.readers:
                reader.cut()
            self._changed.notify_all()

    def withdraw(self, deadline: Deadline) -> bool:
        """Cuts readers off. True: nobody reads the snapshot's memory any more."""
        with self._changed:
            offer = self._offer
            if offer is None:
                return True
            offer.open = False
            offer.withdrawn = True
            self._changed.notify_all()
            for reader in offer.readers:
                reader.cut()
            if not self._changed.wait_for(self._unread, deadline.remaining()):
                return False
            self._offer = None
            return True

    def stop(self, wait: bool, deadline: Deadline) -> None:
        """Closes everything. Idempotent."""
        with self._changed:
            self._stopping = True
            connections = list(self._connections)
            for connection in connections:
                connection.cut()
            self._changed.notify_all()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not every system lets a listener be shut down; closing it is what counts
        self._listener.close()
        withdrawn = self.withdraw(deadline)
        if wait:
            for thread in [self._acceptor, *(c.thread for c in connections)]:
                thread.join(deadline.remaining())
            if not withdrawn or any(c.thread.is_alive() for c in connections):
                logger.warning("the checkpoint server still has readers after %gs", deadline.timeout)

    def _unread(self) -> bool:
        return self._offer is None or (not self._offer.readers and not self._sealers)

    def _seal(self, offer: Offer) -> None:
        try:
            offer.make_seal()
        except Withdrawn:
            pass  # nobody wants the hashes any more
        except Exception:
            logger.exception("the snapshot of step %d could not be hashed", offer.step)
        finally:
            with self._changed:
                self._sealers.discard(threading.current_thread())
                self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError as e:
                if self._stopping:
                    return
                logger.warning("a connection could not be accepted: %s", e)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, 0.1)  # out of file descriptors, for instance
                continue
            connection = _Connection(self, sock, f"{peer[0]}:{peer[1]}")
            with self._changed:
                if self._stopping or len(self._connections) >= MAX_CONNECTIONS:
                    sock.close()
                    continue
                self._connections.add(connection)
            connection.thread.start()

    # What follows is called by connections, in their threads.

    def ended(self, connection: _Connection) -> None:
        with self._changed:
            self._connections.discard(connection)
            if self._offer is not None:
                self._offer.readers.discard(connection)
            self._changed.notify_all()

    def allows(self, headers: dict[str, str]) -> bool:
        if self._token is None:
            return True
        given = headers.get("authorization", "").encode("latin-1", "replace")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    @property
    def stall(self) -> float:
        return self._stall

    def find(self, step: int, connection: _Connection, deadline: Deadline) -> Offer:
        """The offer of ``step``; ``connection`` is a reader of it from here on."""

        def settled() -> bool:
            return self._stopping or step < self._newest or self._readable(step, connection) is not None

        with self._changed:
            self._changed.wait_for(settled, deadline.remaining())
            offer = self._readable(step, connection)
            if offer is None:
                raise self._refusal(step)
            offer.readers.add(connection)
            return offer

    def _readable(self, step: int, connection: _Connection) -> Offer | None:
        offer = self._offer
        if offer is None or offer.step != step or offer.withdrawn:
            return None
        return offer if offer.open or connection in offer.readers else None

    def _refusal(self, step: int) -> _Refused:
        offer = self._offer
        if offer is not None and offer.open and not offer.withdrawn:
            serves = f"step {offer.step} is served"
        elif self._newest >= 0:
            serves = f"no step is served now; the newest was step {self._newest}"
        else:
            serves = "no step has been served yet"
        return _Refused(409 if step < self._newest else 404, f"step {step} was asked for, but {serves}")


class _Connection:
    """One reader's connection and its thread."""

    def __init__(self, server: SnapshotServer, sock: socket.socket, peer: str) -> None:
        self._server = server
        self._sock = sock
        self._peer = peer
        self.dropped = False
        self.thread = threading.Thread(target=self._run, name=f"torchft-http-{peer}", daemon=True)

    def cut(self) -> None:
        """Makes every call on the socket fail now. The server's lock is held: the socket is not closed meanwhile."""
        self.dropped = True
        shut_down(self._sock)

    def _run(self) -> None:
        try:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = HeadReader(self._sock)
            while self._one(reader):
                pass
        except (OSError, TimeoutError, Withdrawn) as e:
            logger.debug("checkpoint reader %s: %s", self._peer, e)
        except Exception:
            logger.exception("serving the checkpoint reader %s failed", self._peer)
        finally:
            self._server.ended(self)
            self._sock.close()

    def _one(self, reader: HeadReader) -> bool:
        head = reader.head(Deadline(_IDLE))
        if head is None:
            return False
        line, headers = head
        set_timeout(self._sock, Deadline(self._server.stall))
        try:
            method, target, version = line.split(" ")
        except ValueError:
            self._answer(400, {}, b"not HTTP\n")
            return False
        try:
            if version != "HTTP/1.1" or headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                raise _Refused(400, "HTTP/1.1 requests without a body are served")
            if method not in ("GET", "HEAD"):
                raise _Refused(405, "GET is served")
            if not self._server.allows(headers):
                raise _Refused(401, "this source asks for a token: give the transport the job's token=")
            path = _PATH.fullmatch(target)
            if path is None:
                raise _Refused(404, "GET /checkpoint/{step}/manifest or /checkpoint/{step}/data")
            wait = _WAIT.search(headers.get("prefer", ""))
            deadline = Deadline(min(float(wait[1]) if wait else 0.0, _MAX_WAIT))
            offer = self._server.find(int(path[1]), self, deadline)
            if path[2] == "manifest":
                self._document(offer, offer.document, method)
            elif path[2] == "hashes":
                if offer.await_seal(deadline, self) is None:
                    raise _Refused(503, f"the snapshot of step {offer.step} is being hashed")
                self._document(offer, offer.hashes, method)
            else:
                self._data(offer, headers, method, deadline)
        except _Refused as e:
            self._answer(e.status, {"Retry-After": "1"} if e.status == 503 else {}, f"{e}\n".encode())
            if e.status == 400:
                return False
        return headers.get("connection", "").lower() != "close"

    def _document(self, offer: Offer, document: bytes, method: str) -> None:
        fields = {**_etag(offer), "Content-Type": "application/json"}
        views = [memoryview(_head(200, fields, len(document))), memoryview(document)]
        send_views(self._sock, views if method == "GET" else views[:1])

    def _data(self, offer: Offer, headers: dict[str, str], method: str, deadline: Deadline) -> None:
        if "if-match" in headers:
            if offer.await_seal(deadline, self) is None:
                raise _Refused(503, f"the snapshot of step {offer.step} is being hashed")
            if headers["if-match"] not in ("*", *_etag(offer).values()):
                raise _Refused(412, f"the root of step {offer.step} is {_etag(offer)['ETag']}")
        total = offer.run.total
        start, stop, status = 0, total, 200
        fields = {**_etag(offer), "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if "range" in headers:
            span = parse_range(headers["range"], total)
            if span is None:
                self._answer(416, {"Content-Range": f"bytes */{total}"}, b"no such range\n")
                return
            start, stop, status = *span, 206
            fields["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        self._sock.sendall(_head(status, fields, stop - start))
        while start < stop and method == "GET":
            end = min(stop, start + CHUNK_SIZE, offer.await_bytes(start + 1, self._server.stall, self))
            send_views(self._sock, offer.run.views(start, end))
            start = end

    def _answer(self, status: int, fields: dict[str, str], body: bytes) -> None:
        self._sock.sendall(_head(status, {**fields, "Content-Type": "text/plain"}, len(body)) + body)


def _etag(offer: Offer) -> dict[str, str]:
    return {} if offer.seal is None else {"ETag": f'"{offer.seal.root}"'}


def _head(status: int, fields: dict[str, str], length: int) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{k}: {v}" for k, v in fields.items())]
    return ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\n").encode("latin-1")


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        except OSError:
            pass  # IPv6 is compiled in but switched off
    return socket.create_server(("0.0.0.0", port), backlog=128)
