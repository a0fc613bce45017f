"""A server of weights whose clients come and go, over process groups of two.

The idea (parameter servers: Li et al., OSDI 2014)
    Groups that train in step have to agree who is there; clients of a server need not. Each client asks the server
    for a *session* over HTTP. Then the two meet as a process group of their own, server rank 0 and client rank 1, under
    a prefix of the server's store that only this session has, and exchange weights and gradients by collectives, in
    whatever way :meth:`ParameterServer.forward` and the client's code agree on.

Rules
    1. A session is one thread of the server and one process group. What happens to it (its client dies, stops, sends
       nonsense) ends it and nothing else: every wait in it is bounded by the group's timeout.
    2. There are never more than ``max_sessions``; who comes beyond that is told to come again later (503).
    3. What comes over HTTP is a request line and headers of bounded size, and is answered with JSON. With a token set,
       who does not present it gets no session. The store itself knows no token: its prefixes cannot be guessed, but do
       not expose its port to a network that you do not trust.
    4. ``forward`` runs in several threads at once: what they share is the subclass's to lock.
"""

from __future__ import annotations

import errno
import hmac
import http.client
import http.server
import json
import logging
import re
import socket
import socketserver
import threading
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from datetime import timedelta
from http import HTTPStatus

from torch._C._distributed_c10d import TCPStore

from torchft import config
from torchft.process_group import DEFAULT_TIMEOUT, ProcessGroup
from torchft.process_group.rendezvous import split_store_address
from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children, close_in_children_fd
from torchft.runtime.net import advertised_host, format_address

__all__ = ["ParameterServer", "ParameterServerError"]

logger = logging.getLogger(__name__)

_PATH = "/new_session"
_REQUEST_TIMEOUT = 10.0  # seconds in which a request must have come
_AGAIN = 0.05  # seconds after which a session that goes on is ended again
_REQUESTS = 32  # handled at the same time
_LONGEST_ANSWER = 4096  # bytes
_SESSION_ID = re.compile(r"[0-9a-f]{32}")


class ParameterServerError(RuntimeError):
    """The server gives no session, or answers something else. The message says why."""


class ParameterServer(ABC):
    """Listens from construction to :meth:`shutdown`. A subclass says what a group is and what a session does.

    Args:
        port: where it listens; 0: any free one.
        store_port: of the store under which the groups meet; 0: any free one.
        hostname: told to clients as its address. By default the one that others are told everywhere
            (``TORCHFT_HOST``, or the interface of the default route).
        token: clients must present it; None: anybody gets a session.
        max_sessions: at the same time.

    Raises:
        OSError: a port is taken.
    """

    def __init__(
        self,
        port: int = 0,
        store_port: int = 0,
        *,
        hostname: str | None = None,
        token: str | None = None,
        max_sessions: int = 64,
    ) -> None:
        self._hostname = hostname
        self._token = token
        self._max_sessions = max_sessions
        self._changed = threading.Condition()
        self._sessions: dict[str, _Session] = {}
        self._closed = False
        self._store = TCPStore("127.0.0.1", store_port, is_master=True, wait_for_workers=False)
        self._registration = close_in_children(own=[self._store.port])
        try:
            self._server = _HttpServer(port, self, socket.AF_INET6)
        except OSError as e:
            if e.errno != errno.EAFNOSUPPORT:
                raise
            self._server = _HttpServer(port, self, socket.AF_INET)  # a machine without IPv6
        close_in_children_fd(self._server.socket)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="torchft-parameter-server", daemon=True
        )
        self._thread.start()

    # ---------------------------------------------------------------------------------- what a subclass says

    @classmethod
    @abstractmethod
    def new_process_group(cls) -> ProcessGroup:
        """A new group, not configured; the same kind on both sides. Its timeout bounds every wait of a session.

        Gloo ends the whole process when a message has another size than is expected there. Where a client's mistake
        must not cost the server, it is a ``ProcessGroupBabyGloo``: then it costs the session's child.
        """

    @abstractmethod
    def forward(self, session_id: str, pg: ProcessGroup) -> None:
        """The server's side of a session, on a thread of its own. The session ends when it returns or raises.

        Args:
            session_id: unique.
            pg: of two members, of which this is rank 0.
        """

    # ------------------------------------------------------------------------------------------- the client

    @classmethod
    def new_session(
        cls, address: str, *, token: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> ProcessGroup:
        """Asks a server for a session and meets it: the client's side.

        Args:
            address: as the server's :meth:`address` says it.
            token: the server's.
            timeout: until when the server must have answered.

        Returns:
            A group of two members, of which this is rank 1. The session ends with its ``shutdown``.

        Raises:
            ParameterServerError: the server cannot be reached, is full, refuses the token or answers nonsense.
            ProcessGroupError: the two did not meet.
        """
        session_id, store_addr = _ask(address, token, timeout.total_seconds())
        pg = cls.new_process_group()
        try:
            pg.configure(store_addr, f"client of session {session_id}", 1, 2)
        except BaseException:
            pg.shutdown()
            raise
        return pg

    # ------------------------------------------------------------------------------------------- the server

    def address(self) -> str:
        """For :meth:`new_session`: ``http://host:port/new_session``."""
        return format_address(advertised_host(given=self._hostname), self._server.server_port) + _PATH

    def sessions(self) -> list[str]:
        """The ids of the sessions under way."""
        with self._changed:
            return list(self._sessions)

    def shutdown(self, timeout: timedelta = timedelta(seconds=10)) -> None:
        """Takes no more clients and ends all sessions. Idempotent.

        Args:
            timeout: how long it waits for sessions that go on although their group was aborted.
        """
        deadline = Deadline(timeout)
        with self._changed:
            self._closed = True
            sessions = list(self._sessions.values())
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(deadline.remaining())
        while (alive := [session for session in sessions if session.thread.is_alive()]) and not deadline.expired:
            for session in alive:
                session.end()  # more than once: its group may be configured only now
            alive[0].thread.join(min(_AGAIN, deadline.remaining()))
        for session in alive:
            logger.warning("session %s goes on after %g s", session.id, deadline.timeout)
        self._registration.forget()

    def _open(self, local_host: str) -> dict[str, str] | None:
        """A new session, as the client is told it; None: there are too many."""
        host = config.HOST.read() or self._hostname or local_host
        with self._changed:
            if self._closed or len(self._sessions) >= self._max_sessions:
                return None
            session = _Session(self, uuid.uuid4().hex)
            self._sessions[session.id] = session
        session.thread.start()
        store = format_address(host, self._store.port).removeprefix("http://")
        return {"session_id": session.id, "store_address": f"{store}/{session.prefix}"}

    def _run(self, session: _Session) -> None:
        """On the session's thread."""
        try:
            session.group = group = self.new_process_group()
            if not self._closed:
                group.configure(
                    f"127.0.0.1:{self._store.port}/{session.prefix}", f"server of session {session.id}", 0, 2
                )
                self.forward(session.id, group)
            logger.info("session %s has ended", session.id)
        except Exception as e:
            if self._closed:
                logger.info("session %s was ended: %s", session.id, e)
            else:
                logger.warning("session %s failed, and is over: %s: %s", session.id, type(e).__name__, e)
        finally:
            with self._changed:
                del self._sessions[session.id]
                self._changed.notify_all()
            if session.group is not None:
                session.group.shutdown()
            self._forget_keys(session.prefix)

    def _forget_keys(self, prefix: str) -> None:
        """The store keeps nothing of sessions that are over."""
        for key in self._store.list_keys() if hasattr(self._store, "list_keys") else ():
            if prefix in key:
                self._store.delete_key(key)


class _Session:
    def __init__(self, server: ParameterServer, session_id: str) -> None:
        self.id = session_id
        self.prefix = f"session/{session_id}"
        self.group: ProcessGroup | None = None
        self.thread = threading.Thread(
            target=server._run, args=(self,), name=f"torchft-session-{session_id[:8]}", daemon=True
        )

    def end(self) -> None:
        if self.group is not None:
            self.group.abort()


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a request has a timeout of its own
    request_queue_size = 128

    def __init__(self, port: int, owner: ParameterServer, family: socket.AddressFamily) -> None:
        self.owner = owner
        self.address_family = family
        self._slots = threading.Semaphore(_REQUESTS)
        super().__init__(("::" if family == socket.AF_INET6 else "0.0.0.0", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's, which looks up the host's name: that can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: object, client_address: object) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        logger.debug("a request of %s ended with an error", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = _REQUEST_TIMEOUT
    server: _HttpServer

    def do_POST(self) -> None:
        owner = self.server.owner
        if self.path != _PATH:
            self._answer(HTTPStatus.NOT_FOUND, {"error": f"there is only {_PATH}"})
            return
        given = (self.headers.get("Authorization") or "").encode()
        if owner._token is not None and not hmac.compare_digest(given, f"Bearer {owner._token}".encode()):
            self._answer(
                HTTPStatus.UNAUTHORIZED, {"error": "this server asks for a token: give new_session its token="}
            )
            return
        host = str(self.connection.getsockname()[0]).removeprefix("::ffff:")
        told = owner._open(host)
        if told is None:
            message = f"the server has no room for another session, it has {owner._max_sessions}: ask again later"
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": message})
            return
        self._answer(HTTPStatus.OK, told)

    def _answer(self, status: HTTPStatus, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("%s: %s", self.client_address[0], format % args)


def _ask(address: str, token: str | None, timeout: float) -> tuple[str, str]:
    """The session id and the store's address that a server answers."""
    request = urllib.request.Request(address, method="POST", data=b"")
    if request.type != "http":
        raise ParameterServerError(f"{address!r} is not the address of a parameter server: http://host:port{_PATH}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with opener.open(request, timeout=timeout) as response:
            body = response.read(_LONGEST_ANSWER)
    except urllib.error.HTTPError as e:
        with e:
            why = _error_in(e.read(_LONGEST_ANSWER)) or e.reason
        raise ParameterServerError(f"the parameter server at {address} gives no session: {why} ({e.code})") from e
    except (OSError, http.client.HTTPException) as e:
        raise ParameterServerError(f"the parameter server at {address} cannot be reached: {e}") from e
    try:
        told = json.loads(body)
        session_id, store_addr = told["session_id"], told["store_address"]
        if not _SESSION_ID.fullmatch(session_id):
            raise ValueError(f"{session_id!r} is no session id")
        split_store_address(store_addr)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ParameterServerError(f"what answers at {address} is no parameter server: {e!r}") from e
    return session_id, store_addr


def _error_in(body: bytes) -> str | None:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, str) else None
