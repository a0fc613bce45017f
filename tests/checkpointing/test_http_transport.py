"""The HTTP transport beyond the conformance suite: the protocol on the socket, slow and dead readers, dying sources."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
import torch

from torchft.checkpointing import (
    CheckpointError,
    CheckpointTimeout,
    HTTPTransport,
    SourceLost,
    StepNotServed,
)
from torchft.checkpointing.chunks import CHUNK_SIZE, read_hashes, read_manifest
from torchft.checkpointing.http_probe import MAX_PROBE, rate_of
from torchft.runtime.deadline import Deadline
from torchft.testing.faults import Link
from torchft.testing.ports import ReservedPort

TIMEOUT = timedelta(seconds=60)
SHORT = timedelta(seconds=1)


@contextmanager
def transport(**options: Any) -> Iterator[HTTPTransport[Any]]:
    one: HTTPTransport[Any] = HTTPTransport(options.pop("timeout", TIMEOUT), hostname="127.0.0.1", **options)
    try:
        yield one
    finally:
        one.shutdown()


def port_of(source: HTTPTransport[Any]) -> int:
    return int(source.metadata().rpartition(":")[2])


def address_of(source: HTTPTransport[Any]) -> str:
    return source.metadata().rpartition("http://")[2]


def get(source: HTTPTransport[Any], path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
    connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def raw(source: HTTPTransport[Any], request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port_of(source)), 60) as sock:
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        return answer


def test_manifest_and_ranges_are_plain_http() -> None:
    with transport() as source:
        data = torch.arange(0, 100, dtype=torch.uint8)
        source.send_checkpoint([1], 5, {"w": data}, TIMEOUT)
        response, body = get(source, "/checkpoint/5/manifest", Prefer="wait=10")
        step, manifest, cut = read_manifest(body)
        assert (response.status, step, manifest.total, cut.count) == (200, 5, 100, 1)
        response, body = get(source, "/checkpoint/5/hashes", Prefer="wait=10")
        step, seal = read_hashes(body)
        assert (response.status, step, seal.cut) == (200, 5, cut)
        etag = f'"{seal.root}"'
        assert response.getheader("ETag") == etag
        response, body = get(source, "/checkpoint/5/data")
        assert (response.status, body) == (200, bytes(range(100)))
        response, body = get(source, "/checkpoint/5/data", Range="bytes=10-19", If_Match=etag)
        assert (response.status, body) == (206, bytes(range(10, 20)))
        assert response.getheader("Content-Range") == "bytes 10-19/100"
        assert get(source, "/checkpoint/5/data", Range="bytes=90-")[1] == bytes(range(90, 100))
        assert get(source, "/checkpoint/5/data", Range="bytes=100-200")[0].status == 416
        assert get(source, "/checkpoint/5/data", Range="bytes=-5")[0].status == 416
        assert get(source, "/checkpoint/5/data", If_Match='"other"')[0].status == 412
        assert get(source, "/checkpoint/4/manifest")[0].status == 409
        assert get(source, "/checkpoint/6/manifest")[0].status == 404
        assert get(source, "/checkpoint/../manifest")[0].status == 404
        assert get(source, "/")[0].status == 404


def test_connection_is_kept_alive() -> None:
    with transport() as source:
        source.send_checkpoint([1], 5, {"w": torch.ones(3)}, TIMEOUT)
        connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
        sockets = set()
        for path, status in (("manifest", 200), ("data", 200), ("nothing", 404), ("manifest", 200)):
            connection.request("GET", f"/checkpoint/5/{path}", headers={"Prefer": "wait=10"})
            sockets.add(connection.sock)
            response = connection.getresponse()
            response.read()
            assert response.status == status
        assert len(sockets) == 1
        connection.close()


def test_a_way_is_measured_without_a_state_and_within_bounds() -> None:
    with transport(token="right") as source, transport(token="right") as receiver, Link(address_of(source)) as link:
        for nbytes in (0, 1, 100_000):
            response, body = get(source, f"/probe/{nbytes}", Authorization="Bearer right")
            assert (response.status, len(body)) == (200, nbytes)
        assert get(source, f"/probe/{MAX_PROBE + 1}", Authorization="Bearer right")[0].status == 416
        assert get(source, "/probe/-1", Authorization="Bearer right")[0].status == 404
        assert get(source, "/probe/1")[0].status == 401
        slow = f"torchft-http/1 http://{link.address}"
        link.throttle(1e6)
        assert receiver.measure([(0, slow)], TIMEOUT) < 3e6, "never more than the link carries, but for a buffer or two"
        link.block()
        blocked = receiver.measure([(0, slow), (1, source.metadata()), (2, "other/1 x")], timedelta(seconds=3))
        assert blocked > 3e6, "those that answer count"
        with pytest.raises(CheckpointError):
            receiver.measure([(0, "other/1 x")], TIMEOUT)
        source.shutdown()
        with pytest.raises(SourceLost):
            receiver.measure([(1, source.metadata())], TIMEOUT)


def test_rate_of_a_probe_is_that_of_its_second_half() -> None:
    assert rate_of([(0.0, 0), (0.25, 900), (0.5, 1000), (1.0, 1500)]) == pytest.approx(1000)
    assert rate_of([(0.0, 0), (1.0, 0)]) == 0
    assert rate_of([(0.0, 0), (0.001, 1000)]) == pytest.approx(1e6)


def test_other_requests_are_refused() -> None:
    with transport() as source:
        assert raw(source, b"POST /checkpoint/1/data HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 405")
        assert raw(source, b"GET /checkpoint/1/data HTTP/1.1\r\nContent-Length: 5\r\n\r\n12345").startswith(
            b"HTTP/1.1 400"
        )
        assert raw(source, b"hello\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert raw(source, b"GET / HTTP/1.1\r\nno header\r\n\r\n") == b""
        assert raw(source, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100 + b"\r\n") == b""
        assert get(source, "/checkpoint/1/manifest")[0].status == 404  # and it still serves


def test_token_is_required_where_one_is_set() -> None:
    with transport(token="right") as source, transport(token="wrong") as wrong, transport() as none:
        source.send_checkpoint([1], 1, {"w": torch.ones(3)}, TIMEOUT)
        assert get(source, "/checkpoint/1/manifest")[0].status == 401
        assert get(source, "/checkpoint/1/data", Authorization="Bearer right")[0].status in (200, 503)
        for receiver in (wrong, none):
            with pytest.raises(CheckpointError, match="token"):
                receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)


def test_metadata_of_something_else_is_refused_with_advice() -> None:
    with transport() as receiver:
        for metadata in ("http://host:1234/checkpoint/", "<n/a>", "", "torchft-http/2 http://h:1"):
            with pytest.raises(CheckpointError, match="same transport"):
                receiver.recv_checkpoint(0, metadata, 1, SHORT)
        for metadata in ("torchft-http/1", "torchft-http/1 ftp://x", "torchft-http/1 http://h:99999"):
            with pytest.raises(CheckpointError, match="no usable address"):
                receiver.recv_checkpoint(0, metadata, 1, SHORT)


def test_receiver_may_ask_before_the_source_offers() -> None:
    with transport() as source, transport() as receiver:
        later = threading.Timer(0.3, source.send_checkpoint, ([1], 4, {"x": 1}, TIMEOUT))
        later.start()
        assert receiver.recv_checkpoint(0, source.metadata(), 4, TIMEOUT) == {"x": 1}
        later.join()


def test_nothing_is_served_after_disallow() -> None:
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 4, {"x": 1}, TIMEOUT)
        source.disallow_checkpoint()
        with pytest.raises(StepNotServed, match="no step is served now; the newest was step 4"):
            receiver.recv_checkpoint(0, source.metadata(), 4, SHORT)
        source.send_checkpoint([1], 5, {"x": 2}, TIMEOUT)
        assert receiver.recv_checkpoint(0, source.metadata(), 5, TIMEOUT) == {"x": 2}


class SlowReader:
    """Asks for the data, takes the first bytes, and then takes nothing until told to."""

    def __init__(self, source: HTTPTransport[Any], step: int) -> None:
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.settimeout(60)
        self._sock.connect(("127.0.0.1", port_of(source)))
        self._sock.sendall(b"GET /checkpoint/%d/data HTTP/1.1\r\nPrefer: wait=10\r\n\r\n" % step)
        self.first = self._sock.recv(1000)

    def rest(self) -> int:
        """How many more bytes come before the connection ends."""
        got = 0
        try:
            while data := self._sock.recv(1 << 20):
                got += len(data)
        except ConnectionResetError:
            pass
        return got

    def body(self, count: int) -> bytes:
        """The body, which has that many bytes. Its head must have come with the first bytes."""
        got = bytearray(self.first.partition(b"\r\n\r\n")[2])
        while len(got) < count and (data := self._sock.recv(1 << 20)):
            got += data
        return bytes(got)

    def close(self) -> None:
        self._sock.close()


def test_copied_state_survives_writes_and_a_slow_reader_blocks_nobody() -> None:
    with transport() as source:
        weights = torch.ones(32 << 18)
        source.send_checkpoint([1], 1, {"w": weights}, TIMEOUT)
        reader = SlowReader(source, 1)
        assert reader.first.startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        source.disallow_checkpoint()
        weights.zero_()
        source.send_checkpoint([1], 2, {"w": weights}, TIMEOUT)
        assert time.monotonic() - began < 30
        assert reader.rest() < weights.nbytes  # it was cut off: its snapshot is gone
        reader.close()


def test_readers_of_uncopied_state_finish_from_a_copy_when_the_source_goes_on() -> None:
    with transport(snapshot="lock") as source, transport() as receiver:
        weights = torch.arange(4 << 20)
        before = weights.clone()
        source.send_checkpoint([1], 1, {"w": weights}, TIMEOUT)
        begun, go_on = threading.Event(), threading.Event()
        receiver._state_dict = lambda: (begun.set(), go_on.wait(60), {})[2]
        got: list[Any] = []
        reading = threading.Thread(
            target=lambda: got.append(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT))
        )
        reading.start()
        assert begun.wait(60)
        source.disallow_checkpoint()  # a reader has the manifest and reads nothing
        weights.zero_()
        go_on.set()
        reading.join(60)
        assert torch.equal(got[0]["w"], before)


def test_slow_reader_of_uncopied_state_gets_what_was_offered_in_the_middle_of_a_chunk() -> None:
    with transport(snapshot="lock") as source:
        weights = torch.ones(32 << 20, dtype=torch.uint8)
        source.send_checkpoint([1], 1, {"w": weights}, TIMEOUT)
        reader = SlowReader(source, 1)
        began = time.monotonic()
        source.disallow_checkpoint()
        assert time.monotonic() - began < 30
        weights.zero_()
        body = reader.body(32 << 20)
        assert body.count(1) == len(body), "what training wrote meanwhile was sent"
        reader.close()


def test_a_reader_that_asks_while_its_snapshot_is_withdrawn_is_not_waited_for() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], 1, {"w": torch.ones(9)}, TIMEOUT)
        connection = HTTPConnection("127.0.0.1", port_of(source), timeout=30)
        connection.request("GET", "/checkpoint/1/manifest")
        connection.getresponse().read()
        server, looked = source._server, threading.Event()
        offer, readable = server.current, server._readable
        assert offer is not None
        offer.withdrawn = True  # as `withdraw` does first
        server._readable = lambda *args: (looked.set(), readable(*args))[1]  # type: ignore[method-assign]
        connection.request("GET", "/checkpoint/1/data", headers={"Prefer": "wait=3600"})
        assert looked.wait(30)
        assert server.withdraw(Deadline(30))
        connection.close()


def test_nothing_is_copied_for_readers_that_have_given_up() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], 1, {"w": torch.ones(32 << 20, dtype=torch.uint8)}, TIMEOUT)
        reader = SlowReader(source, 1)
        reader._sock.shutdown(socket.SHUT_WR)  # what it has not read keeps the source's end busy for ever
        source.disallow_checkpoint()
        assert source._arena.nbytes == 0
        reader.close()


def test_nothing_is_copied_for_readers_that_are_done() -> None:
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, {"w": torch.ones(16 << 18)}, TIMEOUT)
        receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
        source.disallow_checkpoint()
        assert source._arena.nbytes == 0


def test_memory_is_reused_and_freed() -> None:
    with transport() as source:
        source.send_checkpoint([1], 1, {"w": torch.ones(1 << 20)}, TIMEOUT)
        memory = source._arena._memory
        source.send_checkpoint([1], 2, {"w": torch.ones((1 << 20) - 9)}, TIMEOUT)
        assert source._arena._memory is memory
        assert source._arena.nbytes == 4 << 20
        source.shutdown()
        assert source._arena.nbytes == 0
        with pytest.raises(CheckpointError, match="shut down"):
            source.send_checkpoint([1], 3, {}, TIMEOUT)


def test_lost_connection_resumes_where_it_was() -> None:
    with transport() as source, transport() as receiver:
        state = {"w": torch.randint(0, 256, (4 * CHUNK_SIZE,), dtype=torch.uint8)}
        source.send_checkpoint([1], 1, state, TIMEOUT)
        sent: list[tuple[int, int]] = []

        class CutsOnce:
            """Stands before the source and breaks the first data connection after two chunks."""

            def __init__(self) -> None:
                self._cut = False
                self.server = socket.create_server(("127.0.0.1", 0))
                self.thread = threading.Thread(target=self.run, daemon=True)
                self.thread.start()

            def run(self) -> None:
                for _ in range(2):
                    client, _peer = self.server.accept()
                    with client, socket.create_connection(("127.0.0.1", port_of(source)), 60) as upstream:
                        threading.Thread(target=self.up, args=(client, upstream), daemon=True).start()
                        got = 0
                        while data := upstream.recv(1 << 16):
                            client.sendall(data)
                            got += len(data)
                            if not self._cut and got > 2.5 * CHUNK_SIZE:
                                self._cut = True
                                break
                        sent.append((got, 0))
                        client.shutdown(socket.SHUT_RDWR)

            def up(self, client: socket.socket, upstream: socket.socket) -> None:
                try:
                    while data := client.recv(1 << 16):
                        upstream.sendall(data)
                    upstream.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # the test cuts connections

        proxy = CutsOnce()
        metadata = f"torchft-http/1 http://127.0.0.1:{proxy.server.getsockname()[1]}"
        received = receiver.recv_checkpoint(0, metadata, 1, TIMEOUT)
        assert torch.equal(received["w"], state["w"])
        proxy.thread.join(60)
        proxy.server.close()
        assert sent[1][0] < 2.5 * CHUNK_SIZE  # only what was missing was asked for again


SOURCE = """
import sys, torch
from datetime import timedelta
from torchft.checkpointing import HTTPTransport
t = HTTPTransport(timedelta(seconds=30), hostname="127.0.0.1")
t.send_checkpoint([1], 7, {"w": torch.ones(int(sys.argv[1]), dtype=torch.uint8)}, timedelta(seconds=30))
print(t.metadata(), flush=True)
sys.stdin.read()
"""


@contextmanager
def source_process(size: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SOURCE, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("sign", "expected"), [(signal.SIGKILL, SourceLost), (signal.SIGSTOP, CheckpointTimeout)])
def test_source_process_dies_or_hangs_mid_transfer(sign: signal.Signals, expected: type[Exception]) -> None:
    with source_process(64 << 20) as (process, metadata):
        live = torch.zeros(64 << 20, dtype=torch.uint8)

        def state_dict() -> object:
            os.kill(process.pid, sign)
            return {"w": live}

        with transport(state_dict=state_dict) as receiver:
            began = time.monotonic()
            with pytest.raises(expected, match="source"):
                receiver.recv_checkpoint(0, metadata, 7, timedelta(seconds=4))
            assert time.monotonic() - began < 20


def test_unreachable_source_says_what_to_check() -> None:
    with ReservedPort() as nobody, transport() as receiver, pytest.raises(SourceLost, match="TORCHFT_HOST"):
        receiver.recv_checkpoint(0, f"torchft-http/1 http://127.0.0.1:{nobody.port}", 1, SHORT)


def test_first_address_that_answers_is_used() -> None:
    with transport() as source, transport() as receiver, ReservedPort() as dead:
        source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
        metadata = f"torchft-http/1 http://127.0.0.1:{dead.port} http://127.0.0.1:{port_of(source)}"
        assert receiver.recv_checkpoint(0, metadata, 1, TIMEOUT) == {"x": 1}


def test_no_thread_is_left_after_shutdown() -> None:
    before = set(threading.enumerate())
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 1, {"w": torch.ones(8 << 20)}, TIMEOUT)
        receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("torchft-")]
    deadline = time.monotonic() + 60
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [t for t in left if t.is_alive()]


def test_log_lines_keep_their_shape(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "torchft.checkpointing"), transport() as source, transport() as receiver:
        source.send_checkpoint([1], 1, {"w": torch.ones(1000)}, TIMEOUT)
        receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
    lines = [r.getMessage() for r in caplog.records if r.name == "torchft.checkpointing.http_transport"]
    assert lines[0].startswith("preparing state_dict took ")
    (received,) = [line for line in lines if line.startswith("received step 1 from replica rank 0")]
    assert "4000 bytes" in received
    assert "verified" in received
    assert any(line.startswith("copying state_dict took ") for line in lines)
