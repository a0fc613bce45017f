"""Messages between a process and its own children: JSON objects, with open files beside them, over a Unix socket.

The idea
    Both ends are this package in processes of one user, connected by a socket pair that nobody else can reach, so
    nothing here is untrusted. Still there is no pickle: a message is plain data, and what it may hold is bounded.

Rules
    1. A message is 8 bytes (its length and the number of its files), then that many bytes of JSON. The files travel
       with the first of the 8 bytes.
    2. Files that are received belong to the receiver, and are closed in what it starts.
    3. The other end's end is the end of the messages: ``receive`` returns None.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import threading
from typing import Any

__all__ = ["Channel", "Message"]

Message = dict[str, Any]

_HEAD = struct.Struct("=II")
_LONGEST = 64 << 20  # bytes
_MOST_FILES = 16


class Channel:
    """One end.

    Args:
        connection: of a socket pair; belongs to the channel from now on.
        send_timeout: seconds after which a message that the other end does not take is an error.
    """

    def __init__(self, connection: socket.socket, send_timeout: float = 60.0) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self.set_send_timeout(send_timeout)

    @property
    def socket(self) -> socket.socket:
        """For waiting until there is something to receive."""
        return self._socket

    def set_send_timeout(self, seconds: float) -> None:
        whole = int(seconds)
        value = struct.pack("@ll", whole, max(1, int((seconds - whole) * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def send(self, message: Message, files: tuple[int, ...] = ()) -> None:
        """Sends a message, whole, from any thread.

        Raises:
            OSError: the other end is gone, or took nothing for the send timeout.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        data = _HEAD.pack(len(body), len(files)) + body
        with self._sending:
            sent = 0
            if files:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
                sent = self._socket.sendmsg([data], [rights])
            if sent < len(data):
                self._socket.sendall(memoryview(data)[sent:])

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its files; None: the other end is gone. One thread at a time.

        Raises:
            ValueError: what came is no message.
        """
        files: list[int] = []
        head = b""
        while len(head) < _HEAD.size:
            space = socket.CMSG_SPACE(_MOST_FILES * array.array("i").itemsize)
            try:
                piece, ancillary, _, _ = self._socket.recvmsg(_HEAD.size - len(head), space, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return None
            if not piece:
                return None
            head += piece
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                    files.extend(numbers)
        length, count = _HEAD.unpack(head)
        if length > _LONGEST or count != len(files):
            for number in files:
                os.close(number)
            raise ValueError(f"a message of {length} bytes and {count} files, of which {len(files)} came")
        body = bytearray()
        while len(body) < length:
            try:
                piece = self._socket.recv(length - len(body))
            except OSError:
                return None
            if not piece:
                return None
            body += piece
        message: Message = json.loads(body)
        return message, files

    def hang_up(self) -> None:
        """Ends the connection for both: whoever receives, here or there, sees the end. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    def close(self) -> None:
        self._socket.close()
