"""More receivers at once than a source has threads or places for: each gets its state, in its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import TIMEOUT, port_of, transport
from torchft.checkpointing import HTTPTransport, StepNotServed, http_porter
from torchft.testing.wait import wait_until

CROWD = 20
STATE = {"w": torch.arange(9 << 20, dtype=torch.uint8)}  # two chunks: two connections each


@contextmanager
def crowd(source: HTTPTransport[Any], step: int = 1, **options: Any) -> Iterator[list[Future[Any]]]:
    """Receivers that all ask now."""
    with ExitStack() as stack, ThreadPoolExecutor(CROWD) as pool:
        receivers = [stack.enter_context(transport(**options)) for _ in range(CROWD)]
        yield [pool.submit(r.recv_checkpoint, 0, source.metadata(), step, TIMEOUT) for r in receivers]


@pytest.mark.parametrize("local", [True, False])
def test_more_receivers_than_threads_all_get_their_state(monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    monkeypatch.setattr(http_porter, "MAX_THREADS", 4)
    most = [0]
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        start(thread)
        most[0] = max(most[0], sum(t.name == "torchft-http-serve" for t in threading.enumerate()))

    monkeypatch.setattr(threading.Thread, "start", counted)
    with transport(local=local, snapshot="lock") as source, crowd(source) as receiving:
        wait_until(lambda: source._server.connections >= CROWD)  # all of them, before there is anything
        source.send_checkpoint([], 1, STATE, TIMEOUT)
        for one in receiving:
            assert torch.equal(one.result(60)["w"], STATE["w"])
    assert 0 < most[0] <= 5, "one that ends is seen for a moment longer"


@pytest.mark.parametrize("local", [True, False])
def test_who_finds_no_place_comes_again(monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    monkeypatch.setattr(http_porter, "MAX_OPEN", 8)
    told = threading.Event()
    tell_busy = http_porter.Connection.tell_busy
    monkeypatch.setattr(http_porter.Connection, "tell_busy", lambda c: (tell_busy(c), told.set()))
    with transport(local=local) as source, crowd(source) as receiving:
        assert told.wait(60)
        source.send_checkpoint([], 1, STATE, TIMEOUT)
        for one in receiving:
            assert torch.equal(one.result(60)["w"], STATE["w"])


def test_all_are_told_at_once_that_a_step_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_porter, "MAX_THREADS", 2)
    with transport() as source, crowd(source, 4) as receiving:
        wait_until(lambda: source._server.connections >= CROWD)
        source.decline(4, "there is none")
        for one in receiving:
            with pytest.raises(StepNotServed, match="there is none"):
                one.result(60)


@pytest.mark.parametrize("leaves", [True, False])
def test_where_readers_have_all_places_the_next_waits_for_one(monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    """Until it leaves, or has asked for nothing for long."""
    monkeypatch.setattr(http_porter, "MAX_OPEN", 2)
    monkeypatch.setattr(http_porter, "HOLD", 50.0 if leaves else 0.2)
    with transport(local=False) as source, transport() as receiver, ThreadPoolExecutor(1) as pool:
        source.send_checkpoint([], 1, {"x": 1}, TIMEOUT)
        readers = [HTTPConnection("127.0.0.1", port_of(source), timeout=60) for _ in range(2)]
        for reader in readers:
            reader.request("GET", "/checkpoint/1/manifest")
            reader.getresponse().read()
        receiving = pool.submit(receiver.recv_checkpoint, 0, source.metadata(), 1, TIMEOUT)
        if leaves:
            assert not receiving.done()
            readers[0].close()
        assert receiving.result(60) == {"x": 1}
        for reader in readers:
            reader.close()


def test_a_request_that_waits_is_refused_with_the_reason_when_its_time_is_over() -> None:
    with transport() as source:
        connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
        connection.request("GET", "/checkpoint/5/manifest", headers={"Prefer": "wait=0.2"})
        response = connection.getresponse()
        assert (response.status, b"no step has been served yet" in response.read()) == (404, True)
        source.send_checkpoint([], 5, {"x": 1}, TIMEOUT)
        connection.request("GET", "/checkpoint/5/manifest")  # on the same connection
        assert connection.getresponse().status == 200
        connection.close()


def test_a_receiver_that_gives_up_its_wait_is_forgotten() -> None:
    with transport() as source:
        connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
        connection.request("GET", "/checkpoint/5/manifest", headers={"Prefer": "wait=3600"})
        wait_until(lambda: source._server._porter._aside)
        connection.close()
        wait_until(lambda: not source._server.connections)
