"""The source's side of the HTTP transport: one snapshot at a time, for any number of readers.

What a connection may ask for is said in :mod:`torchft.checkpointing.http_connection`.

States of the offer
    none → *open* (``offer``) → *closed* (``close``: new readers are refused, those who have the manifest may finish) →
    *withdrawn* (``withdraw``: readers are cut off; when it returns nobody reads the memory). ``offer`` withdraws what
    was there.

Invariants
    - One thread per connection, at most ``MAX_CONNECTIONS``; all end with ``stop``.
    - A connection that has asked for a snapshot is its reader until the connection ends or asks for another step. To a
      closed offer may also come whose receiver reads it already, on another connection.
    - A slow or dead reader holds up nobody: a connection that takes nothing for ``stall`` seconds is closed.
"""

from __future__ import annotations

import errno
import hmac
import logging
import socket
import threading
from collections.abc import Callable

from torchft.checkpointing.chunks import ByteRun
from torchft.checkpointing.http_connection import Connection, Refused
from torchft.checkpointing.http_local import listen_locally, peer_name
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.offer import Offer, Withdrawn
from torchft.checkpointing.transfers import shut_down
from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children_fd

__all__ = ["SnapshotServer"]

logger = logging.getLogger("torchft.checkpointing.http_transport")

MAX_CONNECTIONS = 128
_MAX_REASON = 1000
_BACKLOG = 128


class SnapshotServer:
    """Listens from construction to :meth:`stop`.

    Args:
        token: readers must send ``Authorization: Bearer {token}``; None: anybody may read.
        stall: seconds after which a reader that takes nothing is dropped.
        port: 0: any; None: none, for readers on this machine alone.
        local: also under a name that only this machine knows.

    Raises:
        OSError: it cannot listen.
    """

    def __init__(self, token: str | None = None, stall: float = 60.0, port: int | None = 0, local: bool = True) -> None:
        self._token = token
        self._stall = stall
        self._changed = threading.Condition()
        self._offer: Offer | None = None
        self._declined: tuple[int, str] | None = None
        self._newest = -1
        self._stopping = False
        self._connections: dict[Connection, None] = {}  # the oldest first
        self._listeners = [] if port is None else [_listen(port)]
        self.port: int = self._listeners[0].getsockname()[1] if self._listeners else 0
        self.local_address: str | None = None
        """For readers on this machine, beside the port."""
        if local and (listening := listen_locally(self.port, _BACKLOG)) is not None:
            self._listeners.append(listening[0])
            self.local_address = listening[1]
        if not self._listeners:
            raise OSError(errno.EAFNOSUPPORT, "this system has no addresses that only its own processes know")
        self._acceptors: list[threading.Thread] = []
        for listener in self._listeners:
            close_in_children_fd(listener)
            acceptor = threading.Thread(target=self._accept, args=(listener,), name="torchft-http-accept", daemon=True)
            self._acceptors.append(acceptor)
            acceptor.start()

    def offer(self, step: int, manifest: Manifest, run: ByteRun) -> Offer:
        """Serves a snapshot, as far as it is told to ``advance``. The one before must have been withdrawn."""
        offer = Offer(step, manifest, run, self._changed)
        with self._changed:
            self._offer = offer
            self._declined = None
            self._newest = max(self._newest, step)
            self._changed.notify_all()
        return offer

    def decline(self, step: int, reason: str) -> None:
        """Who asks for ``step`` is refused at once, with the reason, until something is offered."""
        with self._changed:
            self._declined = step, " ".join(reason.split())[:_MAX_REASON]
            self._changed.notify_all()

    def wait_for_readers(self, deadline: Deadline) -> bool:
        """Whether all readers of the offer have ended before the deadline."""
        with self._changed:
            return self._changed.wait_for(lambda: self._offer is None or not self._offer.readers, deadline.remaining())

    def wait_for_receiver(self, receiver: str, deadline: Deadline, over: Callable[[], bool]) -> bool:
        """Whether all connections of one receiver that reads have ended, before the deadline and before it is over.

        Args:
            receiver: the name that it gives.
            deadline: until when.
            over: whether the answer does not matter any more; asked at the beginning, and after each :meth:`stir`.
        """

        def ended() -> bool:
            return self._offer is None or all(r.receiver != receiver for r in self._offer.readers)

        with self._changed:
            return self._changed.wait_for(lambda: over() or ended(), deadline.remaining()) and ended()

    def stir(self) -> None:
        """Lets who waits here look again."""
        with self._changed:
            self._changed.notify_all()

    @property
    def current(self) -> Offer | None:
        """What is served now."""
        return self._offer

    def drop_readers(self) -> None:
        """Cuts off those who read now. The offer stays as it is; returns at once."""
        with self._changed:
            for reader in () if self._offer is None else self._offer.readers:
                reader.cut()
            self._changed.notify_all()

    def drop_gone(self) -> None:
        """Cuts off readers that have closed their end: they need nothing any more. Returns at once."""
        with self._changed:
            for reader in () if self._offer is None else self._offer.readers:
                if not reader.dropped and reader.gone():
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
        for listener in self._listeners:
            shut_down(listener)  # not every system lets a listener be shut down; closing it is what counts
            listener.close()
        withdrawn = self.withdraw(deadline)
        if wait:
            for thread in [*self._acceptors, *(c.thread for c in connections)]:
                if thread.ident is not None:
                    thread.join(deadline.remaining())
            if not withdrawn or any(c.thread.is_alive() for c in connections):
                logger.warning("the checkpoint server still has readers after %gs", deadline.timeout)

    def _unread(self) -> bool:
        return self._offer is None or (not self._offer.readers and not self._offer.hashing)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, peer = listener.accept()
            except OSError as e:
                if self._stopping:
                    return
                logger.warning("a connection could not be accepted: %s", e)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, 0.1)  # out of file descriptors, for instance
                continue
            close_in_children_fd(sock)
            connection = Connection(self, sock, peer_name(sock, peer))
            with self._changed:
                if self._stopping or not self._make_room():
                    sock.close()
                    continue
                self._connections[connection] = None
            try:
                connection.thread.start()
            except RuntimeError as e:  # the system gives no more threads: the reader is told, and others may come later
                logger.warning("a connection from %s could not be served: %s", connection.receiver, e)
                self.ended(connection)
                sock.close()

    def _make_room(self) -> bool:
        """Whether one more may come. If all places are taken, the oldest that reads nothing has to go for it: whoever
        opens connections and says nothing on them keeps no receiver out.
        """
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        readers = set() if self._offer is None else self._offer.readers
        idle = next((c for c in self._connections if c not in readers and not c.dropped), None)
        if idle is None or len(self._connections) >= 2 * MAX_CONNECTIONS:
            return False
        idle.cut()
        return True

    # What follows is called by connections, in their threads.

    def ended(self, connection: Connection) -> None:
        with self._changed:
            self._connections.pop(connection, None)
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

    def find(self, step: int, connection: Connection, deadline: Deadline) -> Offer:
        """The offer of ``step``; ``connection`` is a reader of it from here on."""

        def settled() -> bool:
            if self._stopping or connection.dropped or step < self._newest or self._why_declined(step):
                return True
            return self._readable(step, connection) is not None

        with self._changed:
            if self._offer is not None and self._offer.step != step:
                self._offer.readers.discard(connection)
            self._changed.wait_for(settled, deadline.remaining())
            if connection.dropped:  # whoever dropped it waits for it to end
                raise Withdrawn("this reader was dropped")
            offer = self._readable(step, connection)
            if offer is None:
                raise self._refusal(step)
            offer.readers.add(connection)
            return offer

    def _readable(self, step: int, connection: Connection) -> Offer | None:
        offer = self._offer
        if offer is None or offer.step != step or offer.withdrawn:
            return None
        known = connection in offer.readers or any(r.receiver == connection.receiver for r in offer.readers)
        return offer if offer.open or known else None

    def _why_declined(self, step: int) -> str:
        return self._declined[1] if self._declined is not None and self._declined[0] == step else ""

    def _refusal(self, step: int) -> Refused:
        if why := self._why_declined(step):
            return Refused(409, f"step {step} was asked for, but could not be offered: {why}")
        offer = self._offer
        if offer is not None and offer.open and not offer.withdrawn:
            serves = f"step {offer.step} is served"
        elif self._newest >= 0:
            serves = f"no step is served now; the newest was step {self._newest}"
        else:
            serves = "no step has been served yet"
        return Refused(409 if step < self._newest else 404, f"step {step} was asked for, but {serves}")


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
        except OSError:
            pass  # IPv6 is compiled in but switched off
    return socket.create_server(("0.0.0.0", port), backlog=_BACKLOG)
