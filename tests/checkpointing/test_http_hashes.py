"""The hashes that a source tells who compares: some of them, at once, and no reader that anybody waits for."""

from __future__ import annotations

import json
import socket
import threading
from http.client import HTTPConnection
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import TIMEOUT, offered, port_of, transport
from torchft.checkpointing import HTTPTransport, chunks, offer
from torchft.checkpointing.chunks import digest
from torchft.runtime.deadline import Deadline

STEP = 4
CHUNK = 1 << 20
"""Bytes, of so small a state."""


@pytest.fixture(autouse=True)
def small_states_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_WHOLE", CHUNK)


def state(chunks: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(chunks * CHUNK // 8)}


def get(source: HTTPTransport[Any], what: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
    try:
        connection.request("GET", f"/checkpoint/{STEP}/{what}")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_what_is_asked_for_is_answered_and_nothing_else() -> None:
    with transport() as source:
        source.send_checkpoint([1], STEP, state(3), TIMEOUT)
        source._await_fill(Deadline(60))
        status, document = get(source, "hashes?chunks=0,2,3,99999999999")
        assert status == 200
        told = json.loads(document)
        assert told["chunk_size"] == CHUNK
        assert len(told["chunks"]) == 44, "base64 of the hashes of chunks 0 and 2: there are no others"
        assert [offered(source).digest_of(i) is None for i in range(3)] == [False, True, False]
        assert get(source, "hashes?chunks=")[0] == 200
        many = ",".join(map(str, range(17)))
        for wrong in ("2,1", "1,1", "1,", ",1", "x", "-1", "1" * 12, many, "1;2", "1&chunks=2"):
            assert get(source, f"hashes?chunks={wrong}")[0] == 400, wrong
        for wrong in ("manifest?chunks=1", "data?chunks=1", "hashes?", "hashes?chunk=1"):
            assert get(source, wrong)[0] == 404, wrong


def test_hashes_that_are_known_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(offer, "digest", lambda views: (made.append(sum(map(len, views))), digest(views))[1])
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(2), TIMEOUT)
        made.clear()
        first = get(source, "hashes?chunks=1")
        assert get(source, "hashes?chunks=1") == first
        assert made == [CHUNK]


class Comparer:
    """A connection that has asked for hashes alone, and stays."""

    def __init__(self, source: HTTPTransport[Any], chunks: str) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port_of(source)), 60)
        self._sock.sendall(f"GET /checkpoint/{STEP}/hashes?chunks={chunks} HTTP/1.1\r\n\r\n".encode())

    def answer(self) -> bytes:
        """What comes until it is cut off; the first piece of it, if it is not."""
        try:
            return self._sock.recv(65536)
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self._sock.close()


def test_nothing_is_copied_for_who_only_compares_and_nobody_waits_for_it() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(2), TIMEOUT)
        comparer = Comparer(source, "0")
        assert comparer.answer().startswith(b"HTTP/1.1 200")
        assert len(offered(source).readers) == 1
        assert offered(source).needed() == set()
        source.disallow_checkpoint()
        assert source._arena.nbytes == 0
        assert comparer.answer() == b"", "it is cut off"
        comparer.close()
        assert get(source, "hashes?chunks=0")[0] == 404, "refused, and told why"


def test_memory_that_is_being_hashed_for_a_comparison_is_waited_for_and_not_read_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashing, go_on, read = threading.Event(), threading.Event(), []

    def slow(views: list[memoryview]) -> bytes:
        if sum(map(len, views)) == CHUNK:
            hashing.set()
            assert go_on.wait(60)
            read.append(digest(views))
        return digest(views)

    monkeypatch.setattr(offer, "digest", slow)
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(3), TIMEOUT)
        comparer = Comparer(source, "0,1,2")
        assert hashing.wait(60)
        stopped = threading.Event()
        stopping = threading.Thread(target=lambda: (source.disallow_checkpoint(), stopped.set()))
        stopping.start()
        assert not stopped.is_set(), "the memory is read"
        go_on.set()
        assert stopped.wait(60)
        stopping.join(60)
        assert len(read) <= 2, "it went on with a snapshot that was withdrawn"
        assert source._arena.nbytes == 0
        assert source._server.current is None
        assert comparer.answer() == b""
        comparer.close()


def test_a_reader_that_also_compares_gets_what_it_needs() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(2), TIMEOUT)
        connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
        for what in ("hashes?chunks=0", "manifest", "hashes?chunks=0"):
            connection.request("GET", f"/checkpoint/{STEP}/{what}")
            assert len(connection.getresponse().read()) > 0
        assert offered(source).needed() == {0, 1}
        source.disallow_checkpoint()
        connection.request("GET", f"/checkpoint/{STEP}/hashes?chunks=1")
        assert connection.getresponse().status == 200, "from the copy"
        connection.close()
