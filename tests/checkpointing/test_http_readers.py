"""Slow, silent and dead readers of an HTTP source: what they get, what is copied for them, and who waits for them."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import TIMEOUT, address_of, offered, port_of, transport
from torchft.checkpointing import CheckpointError, HTTPTransport, SourceLost, StepNotServed, http_server
from torchft.checkpointing.chunks import CHUNK_SIZE, ByteRun
from torchft.checkpointing.description import Description
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.offer import Offer
from torchft.checkpointing.snapshot import Arena
from torchft.runtime.deadline import Deadline
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until


class SlowReader:
    """Asks for the data, takes the first bytes, and then takes nothing until told to."""

    def __init__(self, source: HTTPTransport[Any], step: int, hashed: bool = False) -> None:
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.settimeout(60)
        self._sock.connect(("127.0.0.1", port_of(source)))
        accept = b"Accept: application/x-torchft-hashed\r\n" if hashed else b""
        self._sock.sendall(b"GET /checkpoint/%d/data HTTP/1.1\r\n%bPrefer: wait=10\r\n\r\n" % (step, accept))
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


class Reading:
    """A reader of an offer, without a connection."""

    def __init__(self, receiver: str) -> None:
        self.receiver = receiver
        self.dropped = self.comparing = False
        self.lease = threading.Lock()

    def cut(self) -> None: ...

    def gone(self) -> bool:
        return False


def test_what_many_receivers_of_many_chunks_need_is_found_at_once() -> None:
    count = 1280
    offer = Offer(1, Manifest(b"", None, (count * CHUNK_SIZE,)), threading.Condition())
    readers = [Reading(str(i)) for i in range(1000)]
    offer.readers.update(readers)
    for reader in readers:
        for index in (0, 5, count - 1, int(reader.receiver)):
            offer.sent(reader, index)
    copied: list[tuple[int, int]] = []
    began = time.thread_time()
    offer.move(ByteRun([]), lambda source, target, spans: copied.extend(spans))
    assert time.thread_time() - began < 1.0, "the training waits for it: it took 5 s"
    assert {start // CHUNK_SIZE for start, _ in copied} == set(range(count)) - {0, 5, count - 1}
    assert not offer.was_sent("7")
    for index in range(count):
        offer.sent(readers[7], index)
    assert offer.was_sent("7")
    assert offer.needed() == set(range(count)) - {0, 5, count - 1}
    offer.readers = {readers[7]}
    assert offer.needed() == set()


def test_who_waits_has_the_manifest_when_the_state_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_GREETED", 60.0)
    with transport() as source, closing(HTTPConnection("127.0.0.1", port_of(source), timeout=60)) as waiting:
        waiting.request("GET", "/checkpoint/1/manifest", headers={"Prefer": "wait=60"})
        wait_until(lambda: list(source._server._held.values()) == [1], what="the request is held")
        source.send_checkpoint([1], 1, {"w": torch.ones(1000)}, TIMEOUT)
        waiting.sock.settimeout(0.0)  # what is there, is there now
        assert waiting.getresponse().status == 200
        assert not source._server._held


def test_who_waits_and_does_not_read_does_not_keep_a_state_from_being_offered() -> None:
    with transport() as source, socket.socket() as waiting:
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        waiting.connect(("127.0.0.1", port_of(source)))
        waiting.sendall(b"GET /checkpoint/1/manifest HTTP/1.1\r\nPrefer: wait=60\r\n\r\n")
        wait_until(lambda: bool(source._server._held), what="the request is held")
        began = time.monotonic()
        source.send_checkpoint([1], 1, {"text": "x" * (32 << 20)}, TIMEOUT)
        assert time.monotonic() - began < 30, "as long as a reader may take nothing"
        assert source._server._held, "it has not been sent all of it"
    wait_until(lambda: not source._server._held, what="it has gone")


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


def test_readers_of_uncopied_state_finish_from_a_copy_when_the_source_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with transport(snapshot="lock") as source, transport() as receiver:
        weights = torch.arange(4 << 20)
        before = weights.clone()
        source.send_checkpoint([1], 1, {"w": weights}, TIMEOUT)
        begun, go_on = threading.Event(), threading.Event()
        prepare = receiver._continue
        monkeypatch.setattr(receiver, "_continue", lambda *a: (begun.set(), go_on.wait(60), prepare(*a))[2])
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


def test_who_comes_when_the_source_has_gone_on_is_told_so_and_does_not_ask_again_and_again() -> None:
    with (
        transport(snapshot="lock") as source,
        transport() as slow,
        transport() as late,
        Link(address_of(source)) as link,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = torch.randint(0, 256, (32 << 20,), dtype=torch.uint8)
        before = weights.clone()
        source.send_checkpoint([1, 2], 1, {"w": weights}, TIMEOUT)
        link.throttle(20e6)
        reading = pool.submit(slow.recv_checkpoint, 0, f"torchft-http/1 http://{link.address}", 1, TIMEOUT)
        wait_until(lambda: slow.last_receive is not None and slow.last_receive.done >= 8 << 20, what="a part of it")
        source.disallow_checkpoint()
        weights.zero_()
        offer = offered(source)
        asked, check = [], offer.check_held
        offer.check_held = lambda *chunks: (asked.append(chunks), check(*chunks))[1]  # type: ignore[method-assign,func-returns-value]
        with pytest.raises(StepNotServed, match="went on before this receiver had all of step 1"):
            late.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
        assert len(asked) <= 10
        link.throttle(None)
        assert torch.equal(reading.result(60)["w"], before)


def test_what_was_sent_and_is_asked_for_again_while_the_source_goes_on_ends_the_connection() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], 1, {"w": torch.ones(64 << 20, dtype=torch.uint8)}, TIMEOUT)
        offer = offered(source)
        with closing(SlowReader(source, 1, hashed=True)) as reader:
            offer.sent(next(iter(offer.readers)), offer.cut.count - 1)  # before this connection, say
            source.disallow_checkpoint()
            assert reader.rest() < 64 << 20, "the rest of the body is there"
        with closing(SlowReader(source, 1, hashed=True)) as reader:
            assert reader.first.startswith(b"HTTP/1.1 410 Gone")


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


def test_a_source_without_threads_refuses_a_reader_and_serves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[threading.Thread] = []
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "torchft-http-serve" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
        with pytest.raises(SourceLost):
            receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
        assert receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT) == {"x": 1}
    assert len(refused) == 1


def test_who_cannot_look_at_its_own_tensors_hears_the_source_first() -> None:
    def own() -> object:
        raise OSError("the model is gone")

    with transport() as source, transport(state_dict=own) as receiver:
        source.decline(1, "the optimizer's file is gone")
        with pytest.raises(CheckpointError, match="the optimizer's file is gone"):
            receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
        source.send_checkpoint([1], 2, {"w": torch.ones(4)}, TIMEOUT)
        with pytest.raises(OSError, match="the model is gone"):
            receiver.recv_checkpoint(0, source.metadata(), 2, TIMEOUT)


def test_a_source_that_fails_after_its_manifest_went_out_serves_nothing_of_it_and_the_next_time_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = threading.Event()

    def fail(_: Description) -> list[torch.Tensor]:
        assert asked.wait(60)
        raise MemoryError("no memory for a packed tensor")

    with transport(snapshot="lock") as source, transport() as receiver:
        failed: list[Exception] = []

        def receive() -> None:
            try:
                receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
            except CheckpointError as e:
                failed.append(e)

        prepare = receiver._continue
        monkeypatch.setattr(receiver, "_continue", lambda *a: (asked.set(), prepare(*a))[1])
        reading = threading.Thread(target=receive)
        reading.start()
        with monkeypatch.context() as patch:
            patch.setattr(Description, "extents", fail)
            with pytest.raises(MemoryError):
                source.send_checkpoint([1], 1, {"w": torch.ones(1 << 20)}, TIMEOUT)
        reading.join(20)
        assert len(failed) == 1, "it is told, and does not wait until its timeout"
        assert "no memory for a packed tensor" in str(failed[0])
        source.send_checkpoint([1], 2, {"w": torch.ones(1 << 20)}, TIMEOUT)
        got: Any = receiver.recv_checkpoint(0, source.metadata(), 2, TIMEOUT)
        assert torch.equal(got["w"], torch.ones(1 << 20))


def test_a_copy_that_fails_beside_the_training_is_told_to_those_who_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def fail(*_: object) -> None:
        assert asked.wait(60)
        raise MemoryError("no memory for a copy")

    with transport(snapshot="copy") as source, transport() as receiver:
        prepare = receiver._continue
        monkeypatch.setattr(receiver, "_continue", lambda *a: (asked.set(), prepare(*a))[1])
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "fill", fail)
            source.send_checkpoint([1], 1, {"w": torch.ones(1 << 20)}, TIMEOUT)
            began = time.monotonic()
            with pytest.raises(CheckpointError, match="no memory for a copy"):
                receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
            assert time.monotonic() - began < 20
            with pytest.raises(MemoryError):
                source.disallow_checkpoint()


def test_memory_of_a_received_state_goes_with_it() -> None:
    with transport(snapshot="lock") as source, transport() as receiver:
        gc.disable()  # states are large: none of them may wait until Python looks for cycles
        try:
            source.send_checkpoint([1], 1, {"w": torch.ones(1 << 20)}, TIMEOUT)
            got: Any = receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
            memory = weakref.ref(got["w"].untyped_storage())
            assert memory() is not None
            del got
            assert memory() is None
        finally:
            gc.enable()
