"""Connections between two processes of one machine are not paced.

The idea
    Some congestion controls (bbr) measure the path of a connection and hold its packets back with timers. Between two
    processes of one machine there is no path, only copying: pacing costs a third of the speed and finds nothing. So
    such a connection gets ``reno``, which every Linux has and every process may use. It has nothing to do there,
    as nothing is lost. A connection to another machine keeps what its administrator chose.

Each end decides for what it sends itself.
"""

from __future__ import annotations

import logging
import socket

from torchft.runtime.fork import plain_host

__all__ = ["paces", "unpace"]

logger = logging.getLogger(__name__)

_CONTROL = getattr(socket, "TCP_CONGESTION", None)  # Linux
_NAME_LENGTH = 16
_WINDOWS_ONLY = ("reno", "cubic")


def paces(connection: socket.socket | None = None) -> bool:
    """Whether a TCP connection may be held back by timers; None: one that is opened from now on."""
    if _CONTROL is None:
        return False
    try:
        if connection is None:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as fresh:
                return paces(fresh)
        name = connection.getsockopt(socket.IPPROTO_TCP, _CONTROL, _NAME_LENGTH)
    except OSError:
        return False
    return name.rstrip(b"\0").decode(errors="replace") not in _WINDOWS_ONLY


def unpace(connection: socket.socket) -> bool:
    """Lets a TCP connection send as fast as bytes are copied, if both of its ends are on this machine.

    Returns:
        Whether that changed anything.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or not paces(connection):
        return False
    try:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
        if plain_host(here) != plain_host(there):
            return False
        connection.setsockopt(socket.IPPROTO_TCP, _CONTROL, b"reno")  # type: ignore[arg-type]  # paces() was true
    except OSError as e:  # it has ended, or the system has its own mind
        logger.debug("a connection on this machine stays paced: %s", e)
        return False
    return True
