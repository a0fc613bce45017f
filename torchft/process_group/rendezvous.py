"""Meeting the other members in a store, in a way that ``abort`` can end.

torch's store client waits inside C++, where nothing but its timeout ends it. :class:`RendezvousStore` is what
the backend gets instead: each wait asks whether the keys are there, at intervals that grow with the time waited
so far, and listens for an abort in between.

A question to a store whose process is stopped (not dead) has no timeout in torch at all. So whoever configures a
group sets a watchdog that shuts down the connections to :func:`store_addresses` when the time is over.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from torchft.process_group.base import ProcessGroupError
from torchft.process_group.sockets import DeviceAddress
from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import Registration, close_in_children
from torchft.runtime.net import is_loopback

__all__ = ["Questions", "RendezvousStore", "StoreClient", "split_store_address", "store_addresses"]

logger = logging.getLogger(__name__)

_FIRST_INTERVAL = 0.0005
_LAST_INTERVAL = 0.05


def split_store_address(store_addr: str) -> tuple[str, int, str]:
    """``host:port/prefix/of/keys`` as host, port and prefix. An IPv6 host stands in brackets.

    Raises:
        ValueError: there is no host or no port in it.
    """
    address, _, prefix = store_addr.partition("/")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{store_addr!r} is not a store address: expected host:port/prefix")
    return host.strip("[]"), int(port), prefix


def store_addresses(store_addr: str) -> list[DeviceAddress]:
    """Where a connection to the store may lead to: every address of its host. Empty when that has none."""
    host, port, _ = split_store_address(store_addr)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(str(sockaddr[0]).partition("%")[0], port) for *_, sockaddr in found]


class Questions:
    """Whether the store is being asked something right now: use as a context around each question."""

    def __init__(self) -> None:
        self._open: list[None] = []  # a list, since threads append and pop without a lock

    @property
    def open(self) -> bool:
        return bool(self._open)

    def __enter__(self) -> None:
        self._open.append(None)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.pop()


class StoreClient:
    """A group's connection to the store of its last configuration, used again while the address stays the same.

    That saves the connection, which takes longer than meeting the members: torch's server looks up the name of
    each client. Forked children do not keep it open.

    What a member wrote for a configuration is deleted at the second one after it: the store of a long job would grow
    with the square of its members at each change. Nobody looks for it by then: whoever is still on its way to that
    configuration has been left behind twice.
    """

    def __init__(self) -> None:
        self._address = ("", 0)
        self._client: TCPStore | None = None
        self._registration: Registration | None = None
        self._written: list[tuple[str, list[str]]] = []
        """Prefix and keys of the last configurations in this store, the newest at the end."""

    def __del__(self) -> None:
        self.close()

    def store(self, store_addr: str, deadline: Deadline, aborted: threading.Event) -> RendezvousStore:
        """The store at ``host:port/prefix``, all keys below the prefix.

        A store that refuses the connection is not asked again: its process is gone, and the next quorum names
        another.

        Raises:
            ProcessGroupError: the store cannot be reached before ``deadline``; the message names it.
            ValueError: ``store_addr`` is not one.
        """
        host, port, prefix = split_store_address(store_addr)
        try:
            client = self._known(host, port) or self._connect(host, port, deadline)
        except (OSError, RuntimeError) as e:
            self.close()
            raise ProcessGroupError(
                f"cannot reach the store at {host}:{port} (of {store_addr!r}) within {deadline.timeout:.3g} s: {e}"
                f"{_why_not_from_here(host)}"
            ) from e
        self._written.append((prefix, []))
        return RendezvousStore(PrefixStore(prefix, client), store_addr, deadline, aborted, self._written[-1][1])

    def tidy(self) -> None:
        """The members have met: deletes what was written for the configurations before the last one."""
        while self._client is not None and len(self._written) > 2:
            prefix, keys = self._written.pop(0)
            if prefix in (later for later, _ in self._written):
                continue
            former = PrefixStore(prefix, self._client)
            try:
                for key in keys:
                    former.delete_key(key)
            except RuntimeError as e:  # the store has ended: the next configuration is in another one
                logger.debug("what was written to %s stays there: %s", prefix, e)

    def close(self) -> None:
        """Forgets the connection; it ends when no backend refers to it any more."""
        self._client = None
        self._written.clear()
        if self._registration is not None:
            self._registration.forget()
            self._registration = None

    def _known(self, host: str, port: int) -> TCPStore | None:
        if self._client is None or self._address != (host, port):
            return None
        try:
            self._client.check(["torchft"])
        except RuntimeError:
            return None  # that server has ended; another one listens at its address now
        return self._client

    def _connect(self, host: str, port: int, deadline: Deadline) -> TCPStore:
        self.close()
        self._registration = close_in_children(others=[(host, port)])
        socket.create_connection((host, port), timeout=max(0.001, deadline.remaining())).close()
        self._client = TCPStore(
            host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(0.001, deadline.remaining())),
        )
        self._address = (host, port)
        return self._client


class RendezvousStore(Store):
    """A store whose waits end with an abort.

    Args:
        store: does the work.
        address: of the store, ``host:port/prefix``.
        deadline: of all waits together.
        aborted: ends the waits when set.
        written: gets the keys that are set.
    """

    def __init__(
        self, store: Store, address: str, deadline: Deadline, aborted: threading.Event, written: list[str]
    ) -> None:
        super().__init__()
        self._store = store
        self.address = address
        self._timeout = deadline.timeout
        self._deadline: Deadline | None = deadline
        self._aborted = aborted
        self._written = written
        self.questions = Questions()
        """Open while the store is being asked."""
        self.seen: Callable[[str, bytes], None] = _ignore
        """Told each key that is set or read, and its value, before the backend goes on."""

    def set(self, key: str, value: bytes | str) -> None:
        if self._deadline is not None and self._aborted.is_set():
            raise self._was_aborted()
        self.seen(key, value.encode() if isinstance(value, str) else value)
        self._written.append(key)
        with self.questions:
            self._store.set(key, value)  # type: ignore[arg-type]  # the stub forgets bytes

    def get(self, key: str) -> bytes:
        self.wait([key])
        with self.questions:
            value: bytes = self._store.get(key)
        self.seen(key, value)
        return value

    def add(self, key: str, amount: int) -> int:
        with self.questions:
            return int(self._store.add(key, amount))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        with self.questions:
            values = list(self._store.multi_get(keys))
        for key, value in zip(keys, values, strict=True):
            self.seen(key, value)
        return values

    def lift_deadline(self) -> None:
        """All members are there: the deadline no longer holds for what the backend may ask later."""
        self._deadline = None

    def check(self, keys: list[str]) -> bool:
        with self.questions:
            return bool(self._store.check(keys))

    def delete_key(self, key: str) -> bool:
        with self.questions:
            return bool(self._store.delete_key(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all ``keys`` are there.

        Raises:
            ProcessGroupError: the deadline passed or the group was aborted.
        """
        limits = [d for d in (self._deadline, Deadline(timeout) if timeout is not None else None) if d is not None]
        deadline = min(limits, key=lambda d: d.at) if limits else Deadline(self._timeout)
        waited = 0.0
        while not self._aborted.is_set():
            if self.check(keys):
                return
            if deadline.expired:
                missing = [key for key in keys if not self.check([key])]
                raise ProcessGroupError(
                    f"members of the process group did not come to {self.address} within "
                    f"{self._timeout:g} s: the store has no {', '.join(missing)}"
                    f"{_why_not_from_here(split_store_address(self.address)[0])}"
                )
            interval = min(_LAST_INTERVAL, max(_FIRST_INTERVAL, waited / 4), max(0.0, deadline.remaining()))
            self._aborted.wait(interval)
            waited += interval
        raise self._was_aborted()

    def _was_aborted(self) -> ProcessGroupError:
        return ProcessGroupError(f"aborted while it waited for other members at {self.address}")


def _why_not_from_here(host: str) -> str:
    """What to look at, if this was the reason, when members do not meet in the store at ``host``."""
    if not is_loopback(host):
        return ""
    return (
        f". If the groups are on several machines: {host} is another one on each. On the machine of the group that "
        f"hosts this store TORCHFT_LIGHTHOUSE has to name the lighthouse as elsewhere, or TORCHFT_HOST that machine"
    )


def _ignore(key: str, value: bytes) -> None:
    """Nobody listens to what passes through a store."""
