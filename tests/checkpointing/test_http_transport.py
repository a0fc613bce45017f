"""The HTTP transport beyond the conformance suite: the protocol on the socket, as any client sees it."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import SHORT, TIMEOUT, address_of, port_of, transport
from torchft.checkpointing import (
    CheckpointError,
    CheckpointTimeout,
    HTTPTransport,
    SourceLost,
    StepNotServed,
    Unauthorized,
    snapshot,
)
from torchft.checkpointing.chunks import read_hashes, read_manifest
from torchft.checkpointing.http_probe import MAX_PROBE, rate_of
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until


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
            with pytest.raises(Unauthorized, match="token"):
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


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
def test_the_older_argument_num_chunks_is_accepted_and_changes_nothing(num_chunks: int) -> None:
    state = {"w": torch.arange(1000), "n": 7}
    with transport(num_chunks=num_chunks) as source, transport(num_chunks=num_chunks) as receiver:
        source.send_checkpoint([1], 3, state, TIMEOUT)
        received = receiver.recv_checkpoint(0, source.metadata(), 3, TIMEOUT)
        assert torch.equal(received["w"], state["w"])
        assert received["n"] == 7
        assert read_manifest(get(source, "/checkpoint/3/manifest")[1])[2].count == 1


def test_a_reader_that_comes_after_a_step_was_withdrawn_is_not_held_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source may have failed the step, and wait for this very reader in the next quorum."""
    monkeypatch.setattr("torchft.checkpointing.http_server._RETRIED", 0.1)
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 4, {"x": 1}, TIMEOUT)
        source.disallow_checkpoint()
        began = time.monotonic()
        with pytest.raises(StepNotServed, match="no step is served now; the newest was step 4"):
            receiver.recv_checkpoint(0, source.metadata(), 4, TIMEOUT)
        assert time.monotonic() - began < TIMEOUT.total_seconds() / 2


def test_a_step_that_is_tried_again_is_waited_for() -> None:
    with transport() as source, transport() as receiver, ThreadPoolExecutor(1) as pool:
        source.send_checkpoint([1], 4, {"x": 1}, TIMEOUT)
        source.disallow_checkpoint()
        received = pool.submit(receiver.recv_checkpoint, 0, source.metadata(), 4, TIMEOUT)
        wait_until(lambda: bool(source._server._porter._aside))
        source.send_checkpoint([1], 4, {"x": 2}, TIMEOUT)
        assert received.result(60) == {"x": 2}


def test_nothing_is_served_after_disallow() -> None:
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 4, {"x": 1}, TIMEOUT)
        source.disallow_checkpoint()
        with pytest.raises(StepNotServed, match="no step is served now; the newest was step 4"):
            receiver.recv_checkpoint(0, source.metadata(), 4, SHORT)
        source.send_checkpoint([1], 5, {"x": 2}, TIMEOUT)
        assert receiver.recv_checkpoint(0, source.metadata(), 5, TIMEOUT) == {"x": 2}


def test_a_copy_that_takes_too_long_is_waited_for_each_time_and_read_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, move = threading.Event(), snapshot._move
    monkeypatch.setattr(snapshot, "_move", lambda *args: (go_on.wait(60), move(*args)))
    with transport(timeout=timedelta(seconds=0.2)) as source, transport() as receiver:
        source.send_checkpoint([1], 4, {"w": torch.ones(1000)}, TIMEOUT)
        try:
            for _ in range(2):  # the caller may not write yet, however often it asks
                with pytest.raises(CheckpointTimeout, match=r"not copied within 0\.2s"):
                    source.disallow_checkpoint()
            with pytest.raises(StepNotServed, match=r"could not be offered: the snapshot was not copied"):
                receiver.recv_checkpoint(0, source.metadata(), 4, TIMEOUT)
        finally:
            go_on.set()
        wait_until(lambda: source._fill is None or source._fill.done(), what="the copy is made")
        source.disallow_checkpoint()


def test_what_cannot_be_offered_is_refused_with_the_reason_until_something_is() -> None:
    with transport() as source, transport() as receiver:
        later = threading.Timer(0.2, lambda: source.decline(4, "the state dict function 'x'\nraised"))
        later.start()  # while the receiver waits for an offer
        with pytest.raises(StepNotServed, match="could not be offered: the state dict function 'x' raised"):
            receiver.recv_checkpoint(0, source.metadata(), 4, TIMEOUT)
        later.join()
        source.send_checkpoint([1], 4, {"a": 1}, TIMEOUT)
        assert receiver.recv_checkpoint(0, source.metadata(), 4, TIMEOUT) == {"a": 1}


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
