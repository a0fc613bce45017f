"""Proof that a process has died, which its kernel gives and nobody has to be asked for.

The idea
    Each process keeps one listening socket. As long as the process exists its kernel accepts connections there,
    even while it is stopped or one of its threads holds the GIL; when it is gone the kernel refuses them. So after
    a connection to a process was lost, one look tells its death from trouble on the way: *refused* is a proof of
    death, *accepted* one of life, and anything else says nothing.

Rules
    - A refusal proves something only of an address that was once seen to accept: a firewall refuses, too.
    - Nothing is said on these connections. Who is connected to closes at once.
    - A forked child does not keep the socket: it is no sign of its parent's life.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from enum import Enum

from torchft.runtime import loop
from torchft.runtime.net import advertised_host, format_address, parse_address

__all__ = ["Sign", "examine", "examine_now", "life_address"]

_lock = threading.Lock()
_socket: socket.socket | None = None


class Sign(Enum):
    """What a look at an address showed."""

    ALIVE = "accepts connections"
    GONE = "refuses connections"
    UNKNOWN = "does not answer"


def life_address(toward: str | None = None, hostname: str | None = None) -> str:
    """``host:port`` of this process's socket, opened at the first call.

    Args:
        toward: ``host:port`` of whoever may want to look: it decides which of this machine's addresses is told.
        hostname: told instead, if it resolves.
    """
    global _socket
    with _lock:
        if _socket is None:
            _socket = _open()
            loop.get_loop().call_soon_threadsafe(_serve, _socket)
    return parse_address(format_address(advertised_host(toward, hostname), _socket.getsockname()[1]))


def _open() -> socket.socket:
    try:
        return socket.create_server(("::", 0), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
    except (OSError, ValueError):  # a machine without IPv6
        return socket.create_server(("0.0.0.0", 0), backlog=512)


def _serve(listening: socket.socket) -> None:
    """On the loop: closes what comes, so that the queue of connections never fills."""
    listening.setblocking(False)

    def close_one() -> None:
        try:
            listening.accept()[0].close()
        except OSError:
            pass  # it went away by itself

    asyncio.get_running_loop().add_reader(listening.fileno(), close_one)


async def examine(address: str, timeout: float = 1.0) -> Sign:
    """Looks at a process's address, on the loop.

    Args:
        address: ``host:port``, as :func:`life_address` told it.
        timeout: seconds until no answer is an answer.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return Sign.GONE
    except (OSError, ValueError, OverflowError):  # TimeoutError is one of them; a port beyond 65535 overflows
        return Sign.UNKNOWN
    writer.close()
    return Sign.ALIVE


def examine_now(address: str, timeout: float = 1.0) -> Sign:
    """As :func:`examine`, on any other thread."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
    except ConnectionRefusedError:
        return Sign.GONE
    except (OSError, ValueError, OverflowError):
        return Sign.UNKNOWN
    return Sign.ALIVE


def _after_fork_in_child() -> None:
    global _lock, _socket
    _lock = threading.Lock()
    if _socket is not None:
        _socket.close()
        _socket = None


os.register_at_fork(after_in_child=_after_fork_in_child)
