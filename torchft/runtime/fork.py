"""Forked children let go of our sockets.

The idea
    A forked child (a data-loader worker, say) holds every socket of its parent. When the parent is killed, its
    connections stay open for as long as the child lives, and nobody sees the death. Libraries such as gRPC and gloo
    do not tell their descriptors, but a socket shows its addresses. So those are registered here, and each child
    that is forked closes what they fit.

Rules
    1. A socket is ours if its local address is registered as *own* (it listens there, or was accepted there), or
       its remote address is registered as one of *others* (we connected to it).
    2. In the child, ours are replaced by ``/dev/null``: a library's copy there never meets a number that was given
       to somebody else. Nothing is ever shut down, since that would end the parent's connection.
    3. A child starts with nothing registered: what it opens itself is its own affair.
    4. Nothing here raises in a child or waits for a lock of its parent: the child reads one immutable tuple.

A connection that is still being made when the child is forked has no remote address yet, and is not recognised.
Programs that are started (``subprocess``) inherit none of this: Python closes what they do not need.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
import threading
import weakref
from collections.abc import Iterable

from torchft.runtime.net import parse_address

__all__ = [
    "DESCRIPTORS",
    "Address",
    "Endpoint",
    "Endpoints",
    "Registration",
    "close_in_children",
    "close_in_children_fd",
    "plain_host",
]

logger = logging.getLogger(__name__)

Address = tuple[str, int]
"""Host, a number and never an IPv4 one in its IPv6 clothes, and port."""

Endpoint = Address | str | int
"""Host and port, the host a name or a number; the same as ``host:port``; or only a port, of any interface."""

DESCRIPTORS = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
"""A folder with an entry for each descriptor of this process."""

_ANY = ""


class Endpoints:
    """Tells sockets by their addresses.

    Args:
        own: local addresses. A wildcard host (``0.0.0.0``, ``::``, empty) means any interface.
        others: remote addresses.
    """

    __slots__ = ("_others", "_own")

    def __init__(self, own: Iterable[Address], others: Iterable[Address]) -> None:
        self._own = frozenset(own)
        self._others = frozenset(others)

    def __bool__(self) -> bool:
        return bool(self._own or self._others)

    def fit(self, candidate: socket.socket) -> bool:
        """Whether the socket has one of the addresses at its end, or leads to one.

        Raises:
            OSError: the socket has ended.
        """
        if candidate.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        if self._own:
            host, port = candidate.getsockname()[:2]
            if (plain_host(host), port) in self._own or (_ANY, port) in self._own:
                return True
        if self._others:
            try:
                host, port = candidate.getpeername()[:2]
            except OSError:
                return False  # it is not connected
            return (plain_host(host), port) in self._others or (_ANY, port) in self._others
        return False


def plain_host(host: str) -> str:
    """A numeric host without its zone, an IPv4 one without its IPv6 clothes."""
    host = host.partition("%")[0]
    return host.removeprefix("::ffff:") if "." in host else host


class Registration:
    """What :func:`close_in_children` registered, until :meth:`forget`."""

    def __init__(self) -> None:
        self.endpoints = Endpoints((), ())
        self.held: weakref.ref[socket.socket] | None = None
        self.live = True
        self._own: frozenset[Address] = frozenset()
        self._others: frozenset[Address] = frozenset()

    @property
    def over(self) -> bool:
        """The socket that it is about is closed, or gone."""
        held = None if self.held is None else self.held()
        return self.held is not None and (held is None or held.fileno() < 0)

    def add(self, own: Iterable[Endpoint] = (), others: Iterable[Endpoint] = ()) -> None:
        """Registers more addresses; arguments as for :func:`close_in_children`."""
        own, others = _resolved(own), _resolved(others)
        with _lock:
            self._own, self._others = self._own.union(own), self._others.union(others)
            self.endpoints = Endpoints(self._own, self._others)

    def forget(self) -> None:
        """Children forked from now on keep these sockets. Idempotent."""
        self.live = False
        _enter(())


_lock = threading.RLock()  # of those who register, one of which may be interrupted by a finalizer that forgets
_registered: tuple[Registration, ...] = ()


def _enter(added: tuple[Registration, ...]) -> None:
    global _registered
    with _lock:
        _registered = tuple(r for r in _registered + added if r.live and not r.over)


def close_in_children(own: Iterable[Endpoint] = (), others: Iterable[Endpoint] = ()) -> Registration:
    """From now on, forked children close the sockets of these addresses at once.

    Args:
        own: where we listen. It covers the listening socket and the accepted ones. A port alone, or a wildcard
            host, means that port of any interface.
        others: where we connect to. A name stands for all addresses that it has now; one that cannot be resolved
            is left out.

    Returns:
        To add more, and to forget them.

    Raises:
        ValueError: a text is not ``host:port``.
    """
    registration = Registration()
    registration.add(own, others)
    _enter((registration,))
    return registration


def close_in_children_fd(held: socket.socket) -> Registration:
    """From now on, forked children close this socket at once, for as long as it is open here.

    Its object in the child goes on having a descriptor, of ``/dev/null``.
    """
    registration = Registration()
    registration.held = weakref.ref(held)
    _enter((registration,))
    return registration


def _resolved(endpoints: Iterable[Endpoint]) -> list[Address]:
    addresses: list[Address] = []
    for endpoint in endpoints:
        if isinstance(endpoint, int):
            addresses.append((_ANY, endpoint))
            continue
        if isinstance(endpoint, str):
            name, _, text = parse_address(endpoint).rpartition(":")
            host, port = name.strip("[]"), int(text)
        else:
            host, port = endpoint
        addresses.extend((numeric, port) for numeric in _numeric(host))
    return addresses


def _numeric(host: str) -> list[str]:
    if not host:
        return [_ANY]
    plain = plain_host(host)
    try:
        address = ipaddress.ip_address(plain)
    except ValueError:
        pass  # a name
    else:
        return [_ANY if address.is_unspecified else str(address)]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as e:
        logger.warning("children will keep connections to %s open, since it cannot be resolved: %s", host, e)
        return []
    return [plain_host(str(sockaddr[0])) for *_, sockaddr in found]


# ------------------------------------------------------------------------------------------------- in a child


def _after_fork_in_child() -> None:
    global _lock, _registered
    _lock = threading.RLock()
    registered, _registered = _registered, ()
    if not registered:
        return
    former = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(None)  # or looking at a socket would make it non-blocking, in the parent as well
        _close(registered)
    except Exception:
        pass  # the child must live; a lock of its logging may be held by a thread that it does not have
    finally:
        socket.setdefaulttimeout(former)


def _close(registered: tuple[Registration, ...]) -> None:
    held = {
        s.fileno() for r in registered if r.live and r.held is not None and (s := r.held()) is not None
    }  # a closed one has the number -1
    endpoints = [r.endpoints for r in registered if r.live and r.endpoints]
    ours = [fd for name in os.listdir(DESCRIPTORS) if _is_ours(fd := int(name), held, endpoints)]
    if not ours:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for fd in ours:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def _is_ours(fd: int, held: set[int], endpoints: list[Endpoints]) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        if fd in held:
            return True
        candidate = socket.socket(fileno=fd)
    except OSError:
        return False  # the listing's own descriptor, closed by now, or a socket that Python cannot look at
    try:
        return any(e.fit(candidate) for e in endpoints)
    except OSError:
        return False
    finally:
        candidate.detach()


os.register_at_fork(after_in_child=_after_fork_in_child)
