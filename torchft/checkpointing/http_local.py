"""The way between two processes of one machine: HTTP over a Unix socket, beside the port.

The idea
    Replica groups often share a machine. There a Unix socket moves half as much again as TCP over loopback: no packets
    are made, checked and acknowledged. So a source also listens under a name that only its machine (more exactly: its
    network namespace) knows, chosen at random, and announces it before its other addresses as ``unix:@name``. A
    receiver elsewhere is refused at once by its own kernel, and goes on with the next address.

Only Linux has such names (``man 7 unix``, "abstract"). They leave nothing in a file system, however a process ends.
"""

from __future__ import annotations

import errno
import itertools
import re
import secrets
import socket
import struct
import sys

__all__ = ["is_local", "listen_locally", "local_socket", "peer_name", "peer_process"]

_UCRED = struct.Struct("3i")
_PEERCRED = getattr(socket, "SO_PEERCRED", -1)  # Linux
_numbers = itertools.count(1)
_ADDRESS = re.compile(r"unix:@([a-z0-9-]{1,90})")


def listen_locally(port: int, backlog: int) -> tuple[socket.socket, str] | None:
    """A listening socket and its address; None where the system has none to give.

    Args:
        port: of the same source, for whoever reads the address in a log.
        backlog: connections that may wait to be accepted.
    """
    if sys.platform != "linux":
        return None
    name = f"torchft-http-{port}-{secrets.token_hex(8)}"
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None  # a sandbox may allow the Internet's families only
    try:
        listener.bind(b"\0" + name.encode())
        listener.listen(backlog)
    except OSError:
        listener.close()
        return None
    return listener, f"unix:@{name}"


def is_local(address: str) -> bool:
    """Whether it is of this form."""
    return _ADDRESS.fullmatch(address) is not None


def local_socket(address: str) -> tuple[socket.socket, bytes]:
    """A socket for such an address, and what its ``connect`` takes.

    Raises:
        OSError: this system has none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or sys.platform != "linux":
        raise OSError(errno.EAFNOSUPPORT, f"{address!r} is no address here")
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), b"\0" + match[1].encode()


def peer_name(sock: socket.socket, peer: object) -> str:
    """Who is at the other end of an accepted connection; no two have the same name.

    Args:
        sock: the connection.
        peer: what ``accept`` said of it.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        assert isinstance(peer, tuple)
        return f"{peer[0]}:{peer[1]}"
    number = next(_numbers)
    process = peer_process(sock)
    if process is None:
        return f"connection {number} of this machine"  # a sandbox may not tell
    return f"connection {number} of this machine's process {process[0]}"


def peer_process(sock: socket.socket) -> tuple[int, int] | None:
    """Process and effective user at the other end of a connection; of the end that listened, as it was then.

    None: the connection is none of this machine, or who that is cannot be seen from here (another container).
    """
    if sock.family != getattr(socket, "AF_UNIX", None):
        return None
    try:
        pid, user, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, _PEERCRED, _UCRED.size))
    except OSError:
        return None
    return (pid, user) if pid > 0 else None
