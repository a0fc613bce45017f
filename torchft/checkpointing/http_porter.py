"""Who of all that come to an HTTP source is served now, and who waits its turn.

The idea
    At step 0 every group but one takes the state of the first: many hundred connections to one source, at the same
    moment, before it has offered anything. So a thread belongs to a request that can be answered, not to a connection.
    The *porter*, one thread, accepts connections and watches all that nobody serves; whoever has asked for something
    that is there stands in a queue for one of :data:`MAX_THREADS` threads.

States of a connection
    *silent* (no whole request has come) → *queued* → *served* → silent, or *aside*: what it asks for is not there yet.
    It is queued again when something is offered, or when its patience is over. A thread stays with its connection for
    :data:`_LINGER` seconds after an answer where nobody is queued, since the next request mostly follows at once.

Rules
    - At most :data:`MAX_OPEN` connections, a half of what this process may open at most. For one more goes the oldest
      that reads nothing and has asked for nothing in :data:`GRACE` seconds; else the oldest that is aside is told to
      come again; else goes a reader that has asked for nothing in :data:`HOLD` seconds, which makes a connection anew
      when it wants more; else the next waits in the system's queue. So who connects and says nothing, or asks for what
      never comes, keeps nobody out, and nobody who means well fails for others: it waits, as long as its own deadline
      lets it.
    - The porter waits for nothing but :meth:`_watch`. Only it touches the selector.
    - Requests are served in the order in which they came: a reader of many chunks queues for each run of them.
"""

from __future__ import annotations

import itertools
import logging
import math
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from torchft.checkpointing.http_connection import Connection, NotYet
from torchft.checkpointing.offer import Gone, Withdrawn
from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children_fd

try:
    import resource
except ImportError:  # not everywhere
    resource = None  # type: ignore[assignment]

__all__ = ["Host", "Porter"]

logger = logging.getLogger("torchft.checkpointing.http_transport")

MAX_THREADS = 128
MAX_OPEN = 4096
BACKLOG = 4096
"""Connections that the system may hold until they are accepted, where it allows so many."""
GRACE = 1.0
"""Seconds that a request may take to follow its connection, however many come at once."""
HOLD = 5.0
"""Seconds that a reader's connection stays while it asks for nothing and its place is wanted."""
_IDLE = 60.0
_LINGER = 0.05
_AGAIN = 0.1


class Host(Protocol):
    """Whose porter it is."""

    def admit(self, sock: socket.socket, peer: object) -> Connection:
        """A connection was made."""

    def reads(self, connection: Connection) -> bool:
        """Whether it reads what is offered. The lock is held."""

    def settled(self, step: int) -> bool:
        """Whether a request for that step can be answered, well or not. The lock is held."""

    def ended(self, connection: Connection) -> None:
        """It is not served any more, and will be closed."""


class Porter:
    """See the module.

    Args:
        listeners: where to accept. They are closed by :meth:`stop`.
        host: who answers.
        changed: the host's condition, which guards what is open.
    """

    def __init__(self, listeners: Sequence[socket.socket], host: Host, changed: threading.Condition) -> None:
        self._listeners = listeners
        self._host = host
        self._changed = changed
        self._open: dict[Connection, None] = {}  # the oldest first
        self._queue: deque[Connection] = deque()
        self._returned: list[Connection] = []  # by threads, to be watched
        self._threads: set[threading.Thread] = set()
        self._stirred = self._stopping = False
        self._most = _max_open()
        # What follows is the porter's thread's own.
        self._silent: dict[Connection, float] = {}  # until when, the next first
        self._aside: dict[Connection, Deadline] = {}
        self._alarm = math.inf  # when the first of these is over
        self._accepts = False
        self._accepts_from = 0.0
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        for sock in (self._bell, self._rope, *listeners):
            sock.setblocking(False)
            close_in_children_fd(sock)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="torchft-http-accept", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------- from any thread

    def stir(self) -> None:
        """Lets those that are aside be looked at again: something was offered, or declined."""
        with self._changed:
            self._stirred = True
        self._ring()

    def stop(self) -> list[threading.Thread]:
        """Cuts off everybody; the threads that end then. The porter closes the listeners. Idempotent."""
        with self._changed:
            self._stopping = True
            for connection in self._open:
                connection.cut()
            threads = [self._thread, *self._threads]
            self._changed.notify_all()
        self._ring()
        return threads

    @property
    def open(self) -> int:
        """Connections there are."""
        return len(self._open)

    def _ring(self) -> None:
        try:
            self._rope.send(b"!")
        except OSError:
            pass  # it has been rung often enough, or the porter has gone

    def _end(self, connection: Connection) -> None:
        with self._changed:
            self._open.pop(connection, None)
            self._host.ended(connection)
        connection.close()

    # ------------------------------------------------------------------------------------ a serving thread

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stopping or not self._queue:
                    self._threads.discard(threading.current_thread())
                    return
                connection = self._queue.popleft()
            if self._serve(connection):
                with self._changed:
                    stopping = self._stopping
                    if not stopping:
                        self._returned.append(connection)
                if stopping:  # the porter may have gone
                    self._end(connection)
            self._ring()

    def _serve(self, connection: Connection) -> bool:
        """Answers one request or several. Whether the connection goes on."""
        try:
            while connection.serve():
                if self._queue or not connection.await_request(_LINGER):
                    return True
        except NotYet:
            return True
        except (OSError, TimeoutError, Withdrawn, Gone) as e:
            logger.debug("checkpoint reader %s: %s", connection, e)
        except Exception:
            logger.exception("serving the checkpoint reader %s failed", connection)
        self._end(connection)
        return False

    # ------------------------------------------------------------------------------------------ the porter

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._watch()
        except Exception:
            logger.exception("the checkpoint server has ended, and serves nobody any more")
            self.stop()
        finally:
            for listener in self._listeners:
                listener.close()  # by nobody else: the selector knows them by numbers, which are given anew
            with self._changed:
                left = [*self._silent, *self._aside, *self._queue, *self._returned]
                self._queue.clear()
            for connection in left:
                self._end(connection)
            self._selector.close()
            self._bell.close()
            self._rope.close()

    def _watch(self) -> None:
        self._accept_or_not()
        for key, _ in self._selector.select(self._until_next()):
            what = key.fileobj
            if what is self._bell:
                self._bell.recv(4096)
            elif isinstance(what, socket.socket):
                self._accept(what)
            elif isinstance(what, Connection) and (what in self._silent or what in self._aside):
                self._hear(what)  # it may have had to go for another one
        self._take_returned()
        self._look_at_the_clock()

    def _until_next(self) -> float | None:
        """Seconds until something is due; None: nothing is."""
        due = min(self._alarm, next(iter(self._silent.values()), math.inf))
        left = max(0.0, due - time.monotonic())
        if not self._accepts:
            left = min(left, _AGAIN)
        return None if left == math.inf else left

    def _accept_or_not(self) -> None:
        """Listens, or leaves who comes to the system's queue."""
        now = time.monotonic()
        accepts = now >= self._accepts_from and (len(self._open) < self._most or self._dispensable() is not None)
        if accepts != self._accepts:
            self._accepts = accepts
            for listener in self._listeners:
                if accepts:
                    self._selector.register(listener, selectors.EVENT_READ)
                else:
                    self._selector.unregister(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except BlockingIOError:
            return
        except OSError as e:
            if not self._stopping:
                logger.warning("a connection could not be accepted: %s", e)
                self._accepts_from = time.monotonic() + _AGAIN  # out of file descriptors, for instance
            return
        sock.setblocking(True)
        close_in_children_fd(sock)
        if len(self._open) >= self._most and (goes := self._dispensable()) is not None:
            if goes in self._aside:
                goes.tell_busy()
            self._unwatch(goes)
            self._end(goes)
        try:
            connection = self._host.admit(sock, peer)
        except Exception:
            logger.exception("the connection of %s cannot be served", peer)
            sock.close()
            return
        with self._changed:
            self._open[connection] = None
            if self._stopping:
                connection.cut()
        self._watch_silent(connection)

    def _dispensable(self) -> Connection | None:
        """Who has to go for one more."""
        with self._changed:
            quiet = (c for c in self._quiet_for(GRACE) if not self._host.reads(c))
            aside = (c for c in self._aside if not self._host.reads(c))
            return next(itertools.chain(quiet, aside, self._quiet_for(HOLD)), None)

    def _quiet_for(self, seconds: float) -> Iterator[Connection]:
        """Those that have asked for nothing for so long, the oldest first."""
        old = time.monotonic() + _IDLE - seconds
        return itertools.takewhile(lambda c: self._silent[c] <= old, self._silent)

    def _hear(self, connection: Connection) -> None:
        if connection in self._aside:  # nothing may come before the answer: it has gone
            self._unwatch(connection)
            self._end(connection)
            return
        try:
            if not connection.listen():
                return
        except OSError as e:
            logger.debug("checkpoint reader %s: %s", connection, e)
            self._unwatch(connection)
            self._end(connection)
            return
        self._unwatch(connection)
        self._enqueue(connection)

    def _watch_silent(self, connection: Connection) -> None:
        self._silent[connection] = time.monotonic() + _IDLE
        self._selector.register(connection, selectors.EVENT_READ)

    def _unwatch(self, connection: Connection) -> None:
        self._silent.pop(connection, None)
        self._aside.pop(connection, None)
        self._selector.unregister(connection)

    def _take_returned(self) -> None:
        with self._changed:
            returned, self._returned = self._returned, []
            stirred, self._stirred = self._stirred, False
        look = list(self._aside) if stirred else []
        for connection in returned:
            if connection.dropped:
                self._end(connection)
            elif (waits_for := connection.waits_for) is not None:
                self._aside[connection] = waits_for[1]
                self._alarm = min(self._alarm, waits_for[1].at)
                self._selector.register(connection, selectors.EVENT_READ)
                look.append(connection)
            elif connection.asks:
                self._enqueue(connection)
            else:
                self._watch_silent(connection)
        for connection in look:
            if self._is_settled(connection):
                self._unwatch(connection)
                self._enqueue(connection)

    def _is_settled(self, connection: Connection) -> bool:
        waits_for = connection.waits_for
        with self._changed:
            return waits_for is None or waits_for[1].expired or self._host.settled(waits_for[0])

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if now >= self._alarm:
            for connection in [c for c, deadline in self._aside.items() if deadline.expired]:
                self._unwatch(connection)
                self._enqueue(connection)  # it is told why
            self._alarm = min((d.at for d in self._aside.values()), default=math.inf)
        while self._silent and (oldest := next(iter(self._silent.items())))[1] <= now:
            self._unwatch(oldest[0])
            self._end(oldest[0])

    def _enqueue(self, connection: Connection) -> None:
        """It is served by a thread that is there or a new one; by none if there are none to be had."""
        with self._changed:
            self._queue.append(connection)
            if self._stopping or len(self._threads) >= MAX_THREADS:
                return
            thread = threading.Thread(target=self._work, name="torchft-http-serve", daemon=True)
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as e:  # the system gives no more threads: the reader is told, and others may come later
            with self._changed:
                self._threads.discard(thread)
                if self._threads or connection not in self._queue:
                    return  # one of those will serve it
                self._queue.remove(connection)
            logger.warning("a connection from %s could not be served: %s", connection, e)
            self._end(connection)


def _max_open() -> int:
    if resource is None:
        return MAX_OPEN
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(8, min(MAX_OPEN, soft // 2))
