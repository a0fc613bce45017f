"""What a transport is doing right now, so that another thread can end it.

The idea
    Each call that moves a state is a :class:`Transfer` while it runs. It names what it waits on by how to end it:
    sockets, or a listener. An abort ends the transfers that run at that moment; what begins later is another one and
    never hears of it.

Invariants
    - ``abort`` waits for nobody but for a lock that is held only to register, to forget and to end.
    - What was registered is not closed before it is forgotten, so an abort never ends a descriptor that was reused.
    - An error that leaves an aborted transfer is :class:`TransferAborted`, whatever broke because of the abort.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torchft.checkpointing.transport import TransferAborted

__all__ = ["Transfer", "Transfers", "shut_down"]

_SHUT_DOWN = "this transport was shut down"


def shut_down(sock: socket.socket) -> None:
    """Makes every call on the socket fail now."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is not connected any more


class Transfer:
    """One call that moves a state."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listeners: list[Callable[[], None]] = []
        self._reason: str | None = None
        self._finished = False

    def finish(self) -> None:
        """It has its result, or its error: what still waits on a connection of it ends now, and none is made."""
        with self._lock:
            self._finished = True
            for sock in self._sockets:
                shut_down(sock)

    def abort(self, reason: str) -> None:
        """Ends it, from any thread. The first reason is kept."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            for sock in self._sockets:
                shut_down(sock)
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """``listener`` is called at each abort from here on, until :meth:`leave`. Look at ``aborted`` then."""
        with self._lock:
            self._listeners.append(listener)

    def leave(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.remove(listener)

    @property
    def aborted(self) -> bool:
        return self._reason is not None

    @property
    def over(self) -> bool:
        """It was aborted, or is finished: nothing is to be moved any more."""
        return self._finished or self.aborted

    def check(self) -> None:
        """
        Raises:
            TransferAborted: it was.
        """
        if self._reason is not None:
            raise TransferAborted(f"the transfer was aborted: {self._reason}")

    def connect(self, sock: socket.socket, target: object, limit: float) -> None:
        """Connects a socket that the transfer waits on from here on, until :meth:`close`.

        Args:
            sock: of a stream.
            target: what ``sock.connect`` takes.
            limit: seconds.

        Raises:
            TransferAborted: it was aborted already.
            OSError: there is no connection.
        """
        with self._lock:  # an abort comes before, or finds a socket that is connecting
            self.check()
            if self._finished:
                raise OSError(errno.ECANCELED, "the transfer is over")
            self._sockets.add(sock)
            sock.setblocking(False)
            error = sock.connect_ex(cast(Any, target))
        if error == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            connected = poll.poll(limit * 1000)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if connected else errno.ETIMEDOUT
        if error:
            raise OSError(error, os.strerror(error))
        sock.setblocking(True)

    def cut(self, sock: socket.socket) -> None:
        """Makes every call on a socket that was connected fail now, from any thread."""
        with self._lock:
            if sock in self._sockets:
                shut_down(sock)

    def close(self, sock: socket.socket) -> None:
        """Closes a socket that was connected, or failed to be."""
        with self._lock:
            self._sockets.discard(sock)
            sock.close()


class Transfers:
    """The transfers of one transport that run now."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._running: set[Transfer] = set()
        self._closed = False

    def close(self, wait: float = 0.0) -> bool:
        """Ends all that run and all that would begin. Idempotent.

        Args:
            wait: seconds for those that run to end.

        Returns:
            Whether none runs any more.
        """
        with self._lock:
            self._closed = True
        self.abort(_SHUT_DOWN)
        with self._lock:
            return self._lock.wait_for(lambda: not self._running, wait)

    def abort(self, reason: str) -> None:
        """Ends all that run now. Idempotent; returns at once."""
        with self._lock:
            running = list(self._running)
        for transfer in running:
            transfer.abort(reason)

    @contextmanager
    def begin(self) -> Iterator[Transfer]:
        """A transfer runs inside.

        Raises:
            TransferAborted: instead of any error inside, once it was aborted; at once after :meth:`close`.
        """
        transfer = Transfer()
        with self._lock:
            if self._closed:
                raise TransferAborted(_SHUT_DOWN)
            self._running.add(transfer)
        try:
            yield transfer
        except TransferAborted:
            raise
        except Exception as e:
            try:
                transfer.check()
            except TransferAborted as aborted:
                raise aborted from e
            raise
        finally:
            with self._lock:
                self._running.discard(transfer)
                self._lock.notify_all()
