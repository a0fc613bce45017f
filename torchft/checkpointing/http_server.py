"""The source's side of the HTTP transport: one snapshot at a time, for any number of readers.

What a connection may ask for is said in :mod:`torchft.checkpointing.http_connection`.

States of the offer
    none → *open* (``offer``) → *withdrawn* (``withdraw``: readers are cut off; when it returns nobody reads the
    memory). What was there must be withdrawn before the next ``offer``.

Invariants
    - Who comes is let in, and given a thread, by :mod:`torchft.checkpointing.http_porter`; all ends with ``stop``.
    - A connection that has asked for a snapshot is its reader until the connection ends or asks for another step.
    - A slow or dead reader holds up nobody: a connection that takes nothing for ``stall`` seconds is closed.
"""

from __future__ import annotations

import errno
import hmac
import logging
import math
import socket
import threading
from collections.abc import Callable

from torchft import config
from torchft.checkpointing.http_connection import Connection, NotYet, Refused
from torchft.checkpointing.http_local import listen_locally, peer_name
from torchft.checkpointing.http_porter import BACKLOG, Porter
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.offer import Offer, Withdrawn
from torchft.runtime.deadline import Deadline

__all__ = ["SnapshotServer"]

logger = logging.getLogger("torchft.checkpointing.http_transport")

_MAX_REASON = 1000
_GREETED = 0.01
"""Seconds that an offer waits for the manifest's being sent to those that wait for it."""
_RETRIED = 2.0
"""Seconds within which a step that was withdrawn is served again, if the step is tried again at once."""


class SnapshotServer:
    """Listens from construction to :meth:`stop`.

    Args:
        token: readers must send ``Authorization: Bearer {token}``; None: anybody may read.
        stall: seconds after which a reader that takes nothing is dropped.
        port: 0: any; None: none, for readers on this machine alone.
        local: also under a name that only this machine knows.

    Raises:
        OSError: it cannot listen.
        ConfigError: ``TORCHFT_CROSS_MEMORY`` is neither 0 nor 1.
    """

    def __init__(self, token: str | None = None, stall: float = 60.0, port: int | None = 0, local: bool = True) -> None:
        self._token = token
        self._stall = stall
        self.lends = config.CROSS_MEMORY.read()
        """Whether a receiver of this machine and user is told where the bytes are."""
        self._changed = threading.Condition()
        self._offer: Offer | None = None
        self._declined: tuple[int, str] | None = None
        self._newest = -1
        self._held: dict[Connection, int] = {}  # requests for steps that are not there yet
        listeners = [] if port is None else [_listen(port)]
        self.port: int = listeners[0].getsockname()[1] if listeners else 0
        self.local_address: str | None = None
        """For readers on this machine, beside the port."""
        if local and (listening := listen_locally(self.port, BACKLOG)) is not None:
            listeners.append(listening[0])
            self.local_address = listening[1]
        if not listeners:
            raise OSError(errno.EAFNOSUPPORT, "this system has no addresses that only its own processes know")
        self._porter = Porter(listeners, self, self._changed)

    def offer(self, step: int, manifest: Manifest) -> Offer:
        """Serves a snapshot, as far as it is told to ``advance``. The one before must have been withdrawn. Readers that
        have asked for the step already mostly have its manifest when this returns.
        """
        offer = Offer(step, manifest, self._changed)
        with self._changed:
            self._offer = offer
            self._declined = None
            self._newest = max(self._newest, step)
            self._changed.notify_all()
        self._porter.stir()
        with self._changed:  # who computes on keeps the threads from running that send the manifest
            self._changed.wait_for(lambda: step not in self._held.values(), _GREETED)
        return offer

    def decline(self, step: int, reason: str) -> None:
        """Who asks for ``step`` is refused at once, with the reason, until something is offered."""
        with self._changed:
            self._declined = step, " ".join(reason.split())[:_MAX_REASON]
        self._porter.stir()

    def wait_for_readers(self, deadline: Deadline) -> bool:
        """Whether all readers of the offer that do not only compare have ended before the deadline."""
        with self._changed:
            return self._changed.wait_for(lambda: self._offer is None or not self._offer.wanted, deadline.remaining())

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
        threads = self._porter.stop()
        withdrawn = self.withdraw(deadline)
        if wait:
            for thread in threads:
                if thread.ident is not None:
                    thread.join(deadline.remaining())
            if not withdrawn or any(t.is_alive() for t in threads):
                logger.warning("the checkpoint server still has readers after %gs", deadline.timeout)

    def _unread(self) -> bool:
        return self._offer is None or (not self._offer.readers and not self._offer.hashing)

    @property
    def connections(self) -> int:
        """How many there are."""
        return self._porter.open

    # What follows is called by the porter, and by connections in its threads.

    def admit(self, sock: socket.socket, peer: object) -> Connection:
        return Connection(self, sock, peer_name(sock, peer))

    def reads(self, connection: Connection) -> bool:
        return self._offer is not None and connection in self._offer.readers and not connection.comparing

    def settled(self, step: int) -> bool:
        return step < self._newest or bool(self._why_declined(step)) or self._readable(step) is not None

    def patience(self, step: int) -> float:
        """Longest that a request for ``step`` is held until that is served, in seconds.

        A step that was withdrawn comes again if it failed and is tried again. If it does not soon, the source may be
        waiting for this very reader to give it up.
        """
        with self._changed:
            return _RETRIED if step == self._newest and self._readable(step) is None else math.inf

    def ended(self, connection: Connection) -> None:
        with self._changed:
            if self._offer is not None:
                self._offer.readers.discard(connection)
            self._held.pop(connection, None)
            self._changed.notify_all()

    def answered(self, connection: Connection) -> None:
        """What a connection asked for was sent, or refused."""
        if connection in self._held:
            with self._changed:
                self._held.pop(connection, None)
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
        """The offer of ``step``; ``connection`` is a reader of it from here on.

        Raises:
            NotYet: it may be offered before the deadline.
            Refused: it is not served.
            Withdrawn: this reader was dropped.
        """
        with self._changed:
            if self._offer is not None and self._offer.step != step:
                self._offer.readers.discard(connection)
            if connection.dropped:  # whoever dropped it waits for it to end
                raise Withdrawn("this reader was dropped")
            if not self.settled(step) and not deadline.expired:
                self._held[connection] = step
                raise NotYet
            offer = self._readable(step)
            if offer is None:
                raise self._refusal(step)
            offer.readers.add(connection)
            return offer

    def _readable(self, step: int) -> Offer | None:
        offer = self._offer
        return None if offer is None or offer.step != step or offer.withdrawn else offer

    def _why_declined(self, step: int) -> str:
        return self._declined[1] if self._declined is not None and self._declined[0] == step else ""

    def _refusal(self, step: int) -> Refused:
        if why := self._why_declined(step):
            return Refused(409, f"step {step} was asked for, but could not be offered: {why}")
        offer = self._offer
        if offer is not None and not offer.withdrawn:
            serves = f"step {offer.step} is served"
        elif self._newest >= 0:
            serves = f"no step is served now; the newest was step {self._newest}"
        else:
            serves = "no step has been served yet"
        return Refused(409 if step < self._newest else 404, f"step {step} was asked for, but {serves}")


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        except OSError:
            pass  # IPv6 is compiled in but switched off
    return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)
