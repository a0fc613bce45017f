"""Messages between a process and its children arrive whole, with their files, or not at all."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest

from torchft.runtime.messages import Channel


def _pair() -> tuple[Channel, Channel]:
    one, two = socket.socketpair()
    return Channel(one), Channel(two)


def test_messages_arrive_in_order_with_their_files() -> None:
    one, two = _pair()
    read, write = os.pipe()
    one.send({"n": 1}, (write,))
    one.send({"text": "x" * 100})
    os.close(write)
    first, second = two.receive(), two.receive()
    assert first is not None
    message, files = first
    assert message == {"n": 1}
    os.write(files[0], b"through the copy")
    os.close(files[0])
    assert os.read(read, 100) == b"through the copy"
    assert second == ({"text": "x" * 100}, [])
    os.close(read)
    one.close()
    assert two.receive() is None
    two.close()


def test_a_message_longer_than_the_sockets_buffer_arrives() -> None:
    one, two = _pair()
    message = {"numbers": list(range(500_000))}
    sender = threading.Thread(target=one.send, args=(message,))
    sender.start()
    received = two.receive()
    sender.join(60)
    assert received == (message, [])
    one.close()
    two.close()


def test_sending_to_one_that_takes_nothing_ends() -> None:
    one, two = _pair()
    one.set_send_timeout(0.05)
    with pytest.raises(OSError, match="unavailable"):
        one.send({"text": "x" * 10_000_000})
    one.close()
    two.close()


def test_hanging_up_ends_a_receive_of_this_end() -> None:
    one, two = _pair()
    received: list[object] = ["nothing"]
    waiting = threading.Thread(target=lambda: received.append(one.receive()))
    waiting.start()
    one.hang_up()
    one.hang_up()
    waiting.join(60)
    assert received == ["nothing", None]
    one.close()
    two.close()


def test_an_absurd_length_is_refused_before_memory_is_taken() -> None:
    one, two = _pair()
    one.socket.sendall(struct.pack("=II", 2**32 - 1, 0))
    with pytest.raises(ValueError, match="4294967295 bytes"):
        two.receive()
    one.close()
    two.close()
