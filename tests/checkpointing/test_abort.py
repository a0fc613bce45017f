"""An abort from another thread: what waits for a stopped process ends at once, and what comes next works."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpointing.loopback import address_of
from tests.forked import child
from torchft.checkpointing import CheckpointTransport, HTTPTransport, PGTransport
from torchft.checkpointing.http_download import Download
from torchft.checkpointing.transport import TransferAborted
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.testing import wait
from torchft.testing.faults import Link

LONG = timedelta(seconds=60)
SIZE = 512 << 20  # takes long enough to be stopped in the middle
SOON = 30.0
"""Seconds: the timeouts are a minute."""

HTTP_SOURCE = """
import sys, torch
from datetime import timedelta
from torchft.checkpointing import HTTPTransport
t = HTTPTransport(timedelta(seconds=60), hostname="127.0.0.1", snapshot="lock")
t.send_checkpoint([1], 7, {"w": torch.ones(int(sys.argv[1]), dtype=torch.uint8)}, timedelta(seconds=60))
print(t.metadata(), flush=True)
sys.stdin.read()
"""

PG_SOURCE = """
import sys, torch
from datetime import timedelta
from torchft.checkpointing import PGTransport
from torchft.process_group.gloo import ProcessGroupGloo
t = timedelta(seconds=60)
w = torch.ones(int(sys.argv[1]), dtype=torch.uint8)
pg = ProcessGroupGloo(t)
pg.configure(sys.argv[2], "source", 0, 2)
PGTransport(pg, t, torch.device("cpu"), local_from=int(sys.argv[3])).send_checkpoint([1], 7, {"w": w}, t)
sys.stdin.read()
"""

STOPPING_READER = """
import os, signal, sys, threading, torch
from datetime import timedelta
from torchft.checkpointing import HTTPTransport
live = torch.zeros(int(sys.argv[1]), dtype=torch.uint8)
def stop_when_bytes_came():
    while not live[0]:
        pass
    os.kill(os.getpid(), signal.SIGSTOP)
threading.Thread(target=stop_when_bytes_came, daemon=True).start()
t = HTTPTransport(timedelta(seconds=60), state_dict=lambda: {"w": live}, hostname="127.0.0.1")
t.recv_checkpoint(0, sys.argv[2], 7, timedelta(seconds=60))
"""

wait_until = partial(wait.wait_until, timeout=60.0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def receiver() -> Iterator[HTTPTransport[Any]]:
    transport: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    yield transport
    transport.shutdown()


def assert_aborted(receiving: Future[Any], abort: Callable[[], None]) -> None:
    assert not receiving.done()
    began = time.monotonic()
    abort()
    with pytest.raises(TransferAborted, match="the transfer was aborted: a member died"):
        receiving.result(50)
    assert time.monotonic() - began < SOON


def assert_receives(receiver: CheckpointTransport[Any], pool: ThreadPoolExecutor) -> None:
    """From a source that has nothing to do with what was aborted."""
    source: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    try:
        source.send_checkpoint([1], 8, {"w": torch.full((20 << 20,), 2, dtype=torch.uint8)}, LONG)
        got = pool.submit(receiver.recv_checkpoint, 0, source.metadata(), 8, LONG).result(50)
        assert int(got["w"][-1]) == 2
    finally:
        source.shutdown()


def test_http_source_stopped_in_the_middle(pool: ThreadPoolExecutor) -> None:
    live = torch.zeros(SIZE, dtype=torch.uint8)
    receiver: HTTPTransport[Any] = HTTPTransport(LONG, state_dict=lambda: {"w": live}, hostname="127.0.0.1")
    try:
        with child(HTTP_SOURCE, str(SIZE)) as source:
            assert source.stdout is not None
            metadata = source.stdout.readline().strip()
            receiving = pool.submit(receiver.recv_checkpoint, 0, metadata, 7, LONG)
            wait_until(lambda: live[0])
            source.send_signal(signal.SIGSTOP)
            source.wait_until_stopped()
            assert_aborted(receiving, lambda: receiver.abort("a member died"))
            assert not live[-1]  # it was in the middle
        assert_receives(receiver, pool)
    finally:
        receiver.shutdown()


def test_http_receiver_that_waits_for_the_step(receiver: HTTPTransport[Any], pool: ThreadPoolExecutor) -> None:
    source: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    try:
        receiving = pool.submit(receiver.recv_checkpoint, 0, source.metadata(), 7, LONG)
        wait_until(lambda: source._server.connections)
        assert_aborted(receiving, lambda: receiver.abort("a member died"))
    finally:
        source.shutdown()
    assert_receives(receiver, pool)


def test_http_receiver_that_connects(receiver: HTTPTransport[Any], pool: ThreadPoolExecutor) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        target = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # the queue of connections is full, so no further one is made
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(target)
        receiving = pool.submit(receiver.recv_checkpoint, 0, f"torchft-http/1 http://127.0.0.1:{target[1]}", 7, LONG)
        wait_until(lambda: any(t._sockets for t in receiver._receiving._running))
        assert_aborted(receiving, lambda: receiver.abort("a member died"))
        for sock in waiting:
            sock.close()
    assert_receives(receiver, pool)


def test_http_reader_stopped_in_the_middle_holds_up_nobody(pool: ThreadPoolExecutor) -> None:
    source: HTTPTransport[Any] = HTTPTransport(LONG, snapshot="lock", hostname="127.0.0.1")
    try:
        weights = torch.ones(SIZE, dtype=torch.uint8)
        source.send_checkpoint([1], 7, {"w": weights}, LONG)
        with child(STOPPING_READER, str(SIZE), source.metadata()) as reader:
            reader.wait_until_stopped()
            closing = pool.submit(source.disallow_checkpoint)
            with pytest.raises(TimeoutError):
                closing.result(0.2)
            began = time.monotonic()
            source.abort("a member died")
            closing.result(50)
            assert time.monotonic() - began < SOON
        source.send_checkpoint([1], 8, {"w": weights}, LONG)
        receiver: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
        assert int(receiver.recv_checkpoint(0, source.metadata(), 8, LONG)["w"][-1]) == 1
        receiver.shutdown()
    finally:
        source.shutdown()


def test_a_failed_step_ends_the_wait_for_who_never_offers_it(
    receiver: HTTPTransport[Any], pool: ThreadPoolExecutor
) -> None:
    """Its group lives, waits for this one in the next quorum, and would be waited for here until the timeout."""
    silent: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    try:
        receiving = pool.submit(receiver.recv_checkpoint, 0, silent.metadata(), 7, LONG)
        wait_until(lambda: receiver._download)
        receiver.expect_no_offer("the step failed: a member died")
        with pytest.raises(TransferAborted, match="no source had offered step 7 when the step failed: a member died"):
            receiving.result(SOON)
        assert_receives(receiver, pool)
    finally:
        silent.shutdown()


def test_a_failed_step_does_not_end_a_transfer_that_has_begun(
    receiver: HTTPTransport[Any], pool: ThreadPoolExecutor
) -> None:
    with child(HTTP_SOURCE, str(64 << 20)) as source:
        assert source.stdout is not None
        metadata = source.stdout.readline().strip()
        source.send_signal(signal.SIGSTOP)
        source.wait_until_stopped()
        receiving = pool.submit(receiver.recv_checkpoint, 0, metadata, 7, LONG)
        wait_until(lambda: receiver._download)
        source.send_signal(signal.SIGCONT)
        wait_until(lambda: receiver.last_receive and receiver.last_receive.total)
        receiver.expect_no_offer("the step failed: a member died")
        assert int(receiving.result(50)["w"][-1]) == 1


def test_a_failed_step_ends_a_transfer_whose_other_sources_have_left_it(
    receiver: HTTPTransport[Any], pool: ThreadPoolExecutor
) -> None:
    """They hold a request for a step that they gave up, and wait for this receiver in the next quorum."""
    dying: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    left: HTTPTransport[Any] = HTTPTransport(LONG, hostname="127.0.0.1")
    try:
        dying.send_checkpoint([1], 7, {"w": torch.ones(64 << 20, dtype=torch.uint8)}, LONG)
        with Link(address_of(dying)) as link:
            link.throttle(40e6)
            sources = [(0, f"torchft-http/1 http://{link.address}"), (1, left.metadata())]
            receiving = pool.submit(receiver.recv_from_many, sources, 7, LONG)
            wait_until(lambda: receiver.last_receive and receiver.last_receive.done)
            wait_until(lambda: left._server._porter._aside)
            receiver.expect_no_offer("the step failed: a member died")
            link.refuse()
            link.cut()
            with pytest.raises(TransferAborted, match=r"step 7 does not come any more .* since the step failed: a mem"):
                receiving.result(SOON)
        assert_receives(receiver, pool)
    finally:
        dying.shutdown()
        left.shutdown()


@pytest.mark.parametrize("local_from", [0, sys.maxsize], ids=["local", "group"])
def test_pg_source_stopped_in_the_middle(
    pool: ThreadPoolExecutor, local_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    live = torch.zeros(SIZE, dtype=torch.uint8)
    group, other = ProcessGroupGloo(LONG), ProcessGroupGloo(LONG)
    receiver: PGTransport[Any] = PGTransport(group, LONG, torch.device("cpu"), lambda: {"w": live})
    try:
        address = f"127.0.0.1:{store.port}/first"
        with child(PG_SOURCE, str(SIZE), address, str(local_from)) as source:
            group.configure(address, "receiver", 1, 2)
            stopped = threading.Event()

            def stop() -> None:
                if not stopped.is_set():
                    source.send_signal(signal.SIGSTOP)
                    source.wait_until_stopped()
                    stopped.set()

            def landed(download: Download, *args: Any) -> bool:
                stop()
                return by_local(download, *args)

            by_local = Download._landed
            with monkeypatch.context() as patch:
                patch.setattr(Download, "_landed", landed)
                receiving = pool.submit(receiver.recv_checkpoint, 0, "<n/a>", 7, LONG)
                if local_from:
                    wait_until(lambda: live[0])
                    stop()
                wait_until(stopped.is_set)

            def abort() -> None:
                receiver.abort("a member died")
                group.abort()

            assert_aborted(receiving, abort)
            assert not live[-1]  # it was in the middle
        address = f"127.0.0.1:{store.port}/second"
        configuring = pool.submit(other.configure, address, "source", 0, 2)
        group.configure(address, "receiver", 1, 2)
        configuring.result(50)
        sender: PGTransport[Any] = PGTransport(other, LONG, torch.device("cpu"))
        sending = pool.submit(sender.send_checkpoint, [1], 8, {"w": torch.full_like(live, 2)}, LONG)
        assert receiver.recv_checkpoint(0, "<n/a>", 8, LONG)["w"] is live
        sending.result(50)
        assert int(live[-1]) == 2
    finally:
        group.shutdown()
        other.shutdown()


def test_pg_send_that_is_aborted_ends(pool: ThreadPoolExecutor) -> None:
    """The receiver never takes anything; the group is aborted after the transport, as the Manager does it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}/pg"
    groups = [ProcessGroupGloo(LONG) for _ in range(2)]
    try:
        configuring = pool.submit(groups[1].configure, address, "receiver", 1, 2)
        groups[0].configure(address, "source", 0, 2)
        configuring.result(50)
        source: PGTransport[Any] = PGTransport(groups[0], LONG, torch.device("cpu"))
        sending = pool.submit(source.send_checkpoint, [1], 7, {"w": torch.ones(64 << 20, dtype=torch.uint8)}, LONG)
        wait_until(lambda: source._running._running)

        def abort() -> None:
            source.abort("a member died")
            groups[0].abort()

        assert_aborted(sending, abort)
    finally:
        for group in groups:
            group.shutdown()
