"""Ports that nobody else is given.

A port that was free a moment ago is given to somebody else in the next: a test that chooses one for a process which
starts seconds later, or starts a server again where it was, fails by chance. A socket that is bound and does not listen
keeps the port: the kernel gives it to nobody who asks for any port, connections to it are refused, and whoever names it
and sets ``SO_REUSEADDR``, as all servers here do, listens there.
"""

from __future__ import annotations

import socket

__all__ = ["ReservedPort"]


class ReservedPort:
    """A free port of loopback, kept until it is closed. Use as a context manager or call :meth:`close`."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Gives it back. Idempotent."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
