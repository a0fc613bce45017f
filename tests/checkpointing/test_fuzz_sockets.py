"""A hostile server against ``recv_checkpoint`` and hostile clients against a source, over real sockets."""

from __future__ import annotations

import logging
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.checkpointing.hostile import CASES
from tests.checkpointing.hostile_manifest import BODIES, STATES, mutated_bytes, random_for
from tests.checkpointing.hostile_server import HostileServer
from torchft.checkpointing import CheckpointError, HTTPTransport, http_porter
from torchft.checkpointing.chunks import Cut, Seal, digest, write_hashes, write_manifest, write_sample
from torchft.checkpointing.description import describe
from torchft.checkpointing.http_lent import LENT, write_spans
from torchft.checkpointing.http_local import local_socket
from torchft.checkpointing.http_wire import HASHED
from torchft.testing.wait import wait_until

LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=0.3)
ANSWERS = 600
_KEPT: dict[bytes, bytearray] = {}
"""What a server in this process lends."""
WORKERS = 4
REQUESTS = 3000


def _framed(
    body: bytes, draw: random.Random, status: str = "200 OK", more: str = "", kind: str = HASHED
) -> list[bytes]:
    """An answer whose frame is right in most cases."""
    length = len(body) if draw.random() < 0.8 else draw.choice((0, len(body) - 1, len(body) + 1, 1 << 40, 1 << 63))
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {length}\r\n\r\n"
    data = head.encode()
    if draw.random() < 0.1:
        data = mutated_bytes(data, draw)
    if draw.random() < 0.1:
        body = body[: draw.randrange(len(body) + 1)]
    parts = [data, body] if draw.random() < 0.9 else [data[:9], data[9:], body[:1], body[1:], b"extra"]
    close = [b""] if length > len(body) and draw.random() < 0.8 else []
    return [part for part in parts if part] + close


def hostile_answer(request: bytes, draw: random.Random) -> list[bytes] | None:
    """What a server that means harm may answer, now and then what a good one does."""
    if draw.random() < 0.15:
        return [CASES["head"](draw)]
    if draw.random() < 0.03:
        return None
    described, sources = describe(draw.choice(STATES))
    data = b"".join(bytes(s.view()) for s in sources)
    if (wanted := re.search(rb"Range: bytes=0-(\d+)\r", request)) and draw.random() < 0.8:
        data = (data + bytes(1 << 10))[: int(wanted[1]) + 1]  # as many as were asked for, if not always the right ones
    chunks = digest([memoryview(data)]) if data else b""
    seal = Seal(Cut(len(data)), chunks, digest([memoryview(described.body)]))
    if b"/manifest" in request:
        good = write_manifest(7, described)
        return _framed(good if draw.random() < 0.5 else CASES["document"](draw), draw)
    if b"/hashes?" in request:
        good = write_sample(7, seal.cut, seal.body, [chunks] if chunks else [])
        return _framed(good if draw.random() < 0.5 else CASES["sample"](draw), draw)
    if b"/hashes" in request:
        good = write_hashes(7, seal)
        return _framed(good if draw.random() < 0.5 else CASES["hashes"](draw), draw)
    more = f"Content-Range: bytes 0-{len(data) - 1}/{len(data)}\r\n"
    if b"lend" in request and draw.random() < 0.7:
        memory = _KEPT.setdefault(data, bytearray(data))
        views = [memoryview(memory)[:7], memoryview(memory)[7:]] if len(data) > 7 else [memoryview(memory)]
        spans = write_spans(views) if data else b""
        if draw.random() < 0.4:
            nowhere = struct.pack("<QQ", draw.choice((0, 8, 1 << 46, 1 << 63, (1 << 64) - 1)), len(data))
            spans = draw.choice((nowhere, CASES["loan"](draw)))
        return _framed(spans + chunks, draw, "206 Partial Content", more, LENT)
    return _framed(data + (chunks if draw.random() < 0.7 else draw.randbytes(16)), draw, "206 Partial Content", more)


@contextmanager
def _no_tracebacks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing fell into a place where only mistakes of ours arrive."""
    with caplog.at_level(logging.ERROR, "torchft"):
        yield
    bad = [r for r in caplog.records if r.exc_info]
    assert not bad, f"{bad[0].getMessage()}: {bad[0].exc_info}"


def _receive_from_hostile_servers(numbers: range, into: object, local: bool) -> int:
    """How many of the transfers ended with a state; the others ended with an error of ours, soon."""
    draw = random_for("server", 0)
    lock = threading.Lock()

    def answer(request: bytes) -> list[bytes] | None:
        with lock:
            return hostile_answer(request, draw)

    server = HostileServer(answer, local)
    receiver: HTTPTransport[Any] = HTTPTransport(
        LONG, state_dict=None if into is None else lambda: into, hostname="127.0.0.1"
    )
    metadata = f"torchft-http/1 {server.address}"
    got = 0
    try:
        for number in numbers:
            with lock:
                draw = random_for("server", number)
            began = time.monotonic()
            try:
                receiver.recv_from_many([(rank, metadata) for rank in range(1 + number // 4 % 2)], 7, SHORT)
                got += 1
            except (CheckpointError, TimeoutError):
                pass
            except Exception as e:
                raise AssertionError(f"server {number}: {type(e).__name__}: {e}") from e
            assert time.monotonic() - began < 30, f"server {number} took {time.monotonic() - began:.1f} s"
    finally:
        server.close()
        receiver.shutdown()
    return got


@pytest.mark.parametrize("local", [False, True], ids=["tcp", "this machine"])
def test_receiver_survives_a_hostile_server(local: bool, caplog: pytest.LogCaptureFixture) -> None:
    live = (None, {"w": torch.zeros(5)}, STATES[3], None)
    before = threading.active_count()
    with _no_tracebacks(caplog), ThreadPoolExecutor(WORKERS) as pool:
        parts = [range(i, ANSWERS, WORKERS) for i in range(WORKERS)]
        assert sum(pool.map(_receive_from_hostile_servers, parts, live, [local] * WORKERS)) > 5
    wait_until(lambda: threading.active_count() <= before + 4, what="the threads of the transfers have ended")


def _request(draw: random.Random) -> bytes:
    if draw.random() < 0.05:
        return draw.choice(BODIES)
    return CASES["head"](draw)


def test_source_survives_hostile_clients(caplog: pytest.LogCaptureFixture) -> None:
    """Among them some that never read, never finish a request, or leave at once; then a good one gets its state."""
    source: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    receiver: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    state = {"w": torch.arange(3 << 20, dtype=torch.float32)}
    port = int(source.metadata().rpartition(":")[2])
    address = source._server.local_address
    held: list[socket.socket] = []
    try:
        source.send_checkpoint([1], 7, state, LONG)
        with _no_tracebacks(caplog):
            for number in range(REQUESTS):
                draw = random_for("client", number)
                if number % 2 and address is not None:
                    sock, target = local_socket(address)
                    sock.settimeout(60)
                    sock.connect(target)
                else:
                    sock = socket.create_connection(("127.0.0.1", port), 60)
                try:
                    sock.sendall(_request(draw)[: draw.choice((1 << 30, 1 << 30, 50))])
                    if draw.random() < 0.1:
                        sock.settimeout(0.02)
                        sock.recv(draw.choice((1, 65536)))
                except (BrokenPipeError, ConnectionResetError, TimeoutError):
                    pass
                if draw.random() < 0.02 and len(held) < 40:
                    held.append(sock)
                else:
                    sock.close()
                if number % 1000 == 999:
                    got = receiver.recv_checkpoint(0, source.metadata(), 7, LONG)
                    assert torch.equal(got["w"], state["w"])
        source.send_checkpoint([1], 8, state, LONG)
        assert torch.equal(receiver.recv_checkpoint(0, source.metadata(), 8, LONG)["w"], state["w"])
    finally:
        for sock in held:
            sock.close()
        receiver.shutdown()
        source.shutdown()


def test_connections_that_say_nothing_do_not_keep_a_receiver_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has sent a part of a request, or asks for what never comes; there are more than the source lets in."""
    monkeypatch.setattr(http_porter, "MAX_OPEN", 20)
    monkeypatch.setattr(http_porter, "GRACE", 0.05)
    source: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    receiver: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    port = int(source.metadata().rpartition(":")[2])
    idle: list[socket.socket] = []
    try:
        source.send_checkpoint([1], 7, {"w": torch.ones(1000)}, LONG)
        for number in range(100):
            idle.append(socket.create_connection(("127.0.0.1", port), 60))
            never = b"GET /checkpoint/99/manifest HTTP/1.1\r\nPrefer: wait=3600\r\n\r\n"
            idle[-1].sendall(never if number % 2 else b"G")
        assert float(receiver.recv_checkpoint(0, source.metadata(), 7, LONG)["w"].sum()) == 1000
    finally:
        for sock in idle:
            sock.close()
        receiver.shutdown()
        source.shutdown()
