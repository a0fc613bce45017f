"""A server that answers whatever its test makes of a request."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from torchft.checkpointing.http_local import listen_locally

__all__ = ["HostileServer"]


class HostileServer:
    """Answers each connection's requests with what ``answer`` makes of them, then closes it.

    Args:
        answer: the parts of an answer, an empty one closes; None: closes at once.
        local: listens on a Unix socket, as a source on the receiver's machine does.
    """

    def __init__(self, answer: Callable[[bytes], list[bytes] | None], local: bool = False) -> None:
        self._answer = answer
        listening = listen_locally(1, 64) if local else None
        if listening is not None:
            self._listener, self.address = listening
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port: int = self._listener.getsockname()[1]
            self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(5)
            try:
                while (request := sock.recv(65536)) and (parts := self._answer(request)) is not None:
                    for part in parts:
                        if not part:
                            return  # and closes
                        sock.sendall(part)
            except OSError:
                pass  # the receiver has had enough

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)
