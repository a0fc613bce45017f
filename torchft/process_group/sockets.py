"""Finding and ending the connections of a gloo group, safely beside threads that open sockets of their own.

The idea
    Gloo has no abort: a collective that waits for a stopped member waits until its timeout. It ends at once when
    its connections end, so an abort shuts those down. Gloo does not tell its descriptors, but each of its
    connections has a *device* at one end: the listening address that every member publishes in the store. So a
    connected socket of this process belongs to the group exactly when its local address is our device's (we
    accepted it) or its remote address is another member's device (we opened it).

Invariants
    - The listening socket is never touched: shutting it down crashes gloo.
    - A descriptor is duplicated first, then examined, then shut down. The duplicate stays the same socket
      even when another thread closes the number and opens another file under it in between.

When several members live in one process (tests), an abort of one also ends connections between the others that
lead to the same device: they cannot be told apart.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator

from torchft.runtime.fork import DESCRIPTORS, Address, Endpoints, plain_host
from torchft.runtime.loopback import paces, unpace

__all__ = ["DeviceAddress", "device_address", "pair_identifiers", "shut_down_connections", "unpace_connections"]


DeviceAddress = Address
"""Host, an IPv4 one never in its IPv6 clothes, and port."""


def device_address(published: bytes) -> DeviceAddress | None:
    """The device's address in what a member published for gloo under ``<context>/<rank>``; None: not recognised.

    Gloo writes a 64-bit length and the host name, then a 64-bit length and a ``sockaddr_storage``.
    """
    if len(published) < 8:
        return None
    (name_length,) = struct.unpack_from("=Q", published)
    raw = published[8 + name_length + 8 :]
    if len(raw) < 28:
        return None
    family = struct.unpack_from("=H", raw)[0]
    (port,) = struct.unpack_from("!H", raw, 2)
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    if family == socket.AF_INET6:
        return plain_host(socket.inet_ntop(socket.AF_INET6, raw[8:24])), port
    return None


def pair_identifiers(published: bytes, world_size: int) -> list[int]:
    """The numbers that the other members tell our device when they connect, by rank; empty: not recognised.

    They follow the address, 64 bits for each member.
    """
    if len(published) < 8:
        return []
    (name_length,) = struct.unpack_from("=Q", published)
    at = 8 + name_length
    if len(published) < at + 8:
        return []
    (address_length,) = struct.unpack_from("=Q", published, at)
    tail = published[at + 8 + address_length :]
    return list(struct.unpack(f"={world_size}q", tail)) if len(tail) == 8 * world_size else []


def shut_down_connections(own: Iterable[DeviceAddress], others: Iterable[DeviceAddress]) -> int:
    """Shuts down this process's connections of a group; whoever waits on them gets an error at once.

    Args:
        own: addresses of the caller's devices.
        others: addresses of the other members' devices.

    Returns:
        How many connections were shut down.
    """
    return sum(1 for connection in _connections(own, others) if _shut_down(connection))


def unpace_connections(own: Iterable[DeviceAddress], others: Iterable[DeviceAddress]) -> int:
    """Lets this process's connections of a group that stay on this machine send as fast as bytes are copied.

    Args:
        own: addresses of the caller's devices.
        others: addresses of the other members' devices.

    Returns:
        How many connections that changed.
    """
    own = tuple(own)
    hosts = {host for host, _ in own}
    others = tuple(address for address in others if address[0] in hosts)
    if not others or not paces():
        return 0
    return sum(1 for connection in _connections(own, others) if unpace(connection))


def _connections(own: Iterable[DeviceAddress], others: Iterable[DeviceAddress]) -> Iterator[socket.socket]:
    """This process's connected sockets that have one of ``own`` here or one of ``others`` there, in turn."""
    endpoints = Endpoints(own, others)
    if not endpoints:
        return
    for name in os.listdir(DESCRIPTORS):
        duplicate = _duplicate(int(name))
        if duplicate is None:
            continue
        with duplicate:
            try:
                if not endpoints.fit(duplicate):
                    continue
                duplicate.getpeername()  # fails for the listening socket
            except OSError:
                continue  # not connected: a listening socket, or one that has ended already
            yield duplicate


def _shut_down(connection: socket.socket) -> bool:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False  # it has ended already
    return True


def _duplicate(descriptor: int) -> socket.socket | None:
    """A second descriptor of the socket; None: it is no socket, or was closed since it was listed."""
    try:
        second = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=second)
    except OSError:
        os.close(second)
        return None
