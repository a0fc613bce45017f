"""How many bytes this process really sends, as its kernel counts them for each TCP connection.

Unlike an interface's counters these are of this process alone, and unlike a wrapper's arithmetic they are of what went
over the wire. Linux only.
"""

from __future__ import annotations

import os
import socket
import struct

from torchft.runtime.fork import DESCRIPTORS

__all__ = ["bytes_sent"]

_BYTES_ACKED_AT = 120  # of struct tcp_info, linux/tcp.h: data that has arrived
_LENGTH = 256


def bytes_sent() -> int:
    """Payload that has left by the TCP connections that are open now, and was acknowledged.

    The difference of two calls counts what was sent in between, as long as no connection ends.
    """
    count = 0
    for name in os.listdir(DESCRIPTORS):
        try:
            duplicate = os.dup(int(name))
        except OSError:
            continue  # the listing's own
        try:
            connection = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue  # no socket
        with connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LENGTH)
            if len(info) >= _BYTES_ACKED_AT + 8:
                count += struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0]
    return count
