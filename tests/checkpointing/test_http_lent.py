"""A receiver on the source's machine copies out of its memory: when it does, when it may not, and what it gets then."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import TIMEOUT, offered, over_tcp, same, transport
from tests.forked import ForkedProgram, child
from torchft import config
from torchft.checkpointing import CheckpointTimeout, HTTPTransport, SourceLost, TransferAborted, http_lent, http_local
from torchft.checkpointing.chunks import CHUNK_SIZE
from torchft.checkpointing.http_lent import ACCEPTED_SPANS, Borrower, Loan, is_lent, write_spans
from torchft.checkpointing.transport import ManifestError
from torchft.runtime.cross_memory import address_of, can_read_others
from torchft.runtime.deadline import Deadline
from torchft.testing.wait import wait_until

pytestmark = pytest.mark.skipif(not can_read_others(), reason="this system has no process_vm_readv")

CHUNKS = 20
BYTES = CHUNKS * CHUNK_SIZE
Copy = Callable[[Borrower, Loan, Sequence[memoryview], Callable[[int], object]], bytes]
COPY: Copy = Borrower.copy


def state() -> dict[str, torch.Tensor]:
    """Of 20 chunks, with tensors that begin and end inside of them."""
    sizes = [BYTES // 3, 5 * CHUNK_SIZE + 4096, *([70 << 10] * 40)]
    sizes.append(BYTES - sum(sizes))
    return {f"w{i}": torch.randint(0, 256, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)}


def borrowed(receiver: HTTPTransport[Any]) -> int:
    assert receiver.last_receive is not None
    return receiver.last_receive.borrowed


def quiet(receiver: HTTPTransport[Any]) -> bool:
    """Nothing was said to be bad or lost."""
    progress = receiver.last_receive
    assert progress is not None
    return not progress.bad and not progress.bad_sources and not progress.retries


@pytest.fixture(autouse=True)
def _nothing_told() -> Iterator[None]:
    told = set(http_lent._told)
    http_lent._told -= {errno.EPERM, errno.EFAULT}
    yield
    http_lent._told |= told


SOURCE = """
import ctypes, sys, torch
from datetime import timedelta
from torchft.checkpointing import HTTPTransport
if sys.argv[1] == "hidden":
    assert ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
t = HTTPTransport(timedelta(seconds=30), hostname="127.0.0.1", snapshot=sys.argv[2])
torch.manual_seed(1)
t.send_checkpoint([1], 7, {"w": torch.randint(0, 256, (50_000_000,), dtype=torch.uint8)}, timedelta(seconds=30))
print(t.metadata(), flush=True)
sys.stdin.read()
"""
RECEIVER = """
import ctypes, logging, os, sys, torch
from datetime import timedelta
from torchft.checkpointing import HTTPTransport
if os.geteuid() == 0:  # who may trace everybody is not told by a process that hides
    empty = (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    assert ctypes.CDLL(None, use_errno=True).capset(header, empty) == 0
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
t = HTTPTransport(timedelta(seconds=30), hostname="127.0.0.1")
got = t.recv_checkpoint(0, sys.argv[1], 7, timedelta(seconds=30))
torch.manual_seed(1)
assert torch.equal(got["w"], torch.randint(0, 256, (50_000_000,), dtype=torch.uint8))
print("borrowed", t.last_receive.borrowed)
"""


@contextmanager
def source_process(*arguments: str) -> Iterator[str]:
    with child(SOURCE, *arguments) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@pytest.mark.parametrize("snapshot", ["copy", "lock"])
def test_a_state_comes_out_of_another_processs_memory(snapshot: str, caplog: pytest.LogCaptureFixture) -> None:
    with source_process("open", snapshot) as metadata, transport() as receiver, caplog.at_level("INFO"):
        received = receiver.recv_checkpoint(0, metadata, 7, TIMEOUT)
        torch.manual_seed(1)
        assert torch.equal(received["w"], torch.randint(0, 256, (50_000_000,), dtype=torch.uint8))
        assert borrowed(receiver) == 50_000_000
    assert "50000000 copied out of a source's memory" in caplog.text


def test_where_the_system_forbids_it_the_bytes_come_over_the_socket_and_that_is_said_once() -> None:
    """A source that nobody may trace, and a receiver without privileges: real ones."""
    with source_process("hidden", "lock") as metadata:
        receiver = ForkedProgram(
            [sys.executable, "-c", RECEIVER, metadata], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            said = receiver.communicate(timeout=60)[0]
        finally:
            receiver.kill()
    assert receiver.returncode == 0, said
    assert "borrowed 0" in said
    assert said.count("its bytes come over a socket, which is slower") == 1
    assert os.strerror(errno.EPERM) + "; kernel.yama.ptrace_scope, or a sandbox, forbids it" in said


def test_it_can_be_switched_off_at_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = state()
    for off in ("source", "receiver"):
        if off == "source":
            monkeypatch.setenv("TORCHFT_CROSS_MEMORY", "0")
        with transport(snapshot="lock") as source, transport() as receiver:
            monkeypatch.delenv("TORCHFT_CROSS_MEMORY", raising=False)
            if off == "receiver":
                monkeypatch.setenv("TORCHFT_CROSS_MEMORY", "0")
            source.send_checkpoint([1], 1, sent, TIMEOUT)
            assert same(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT), sent)
            assert borrowed(receiver) == 0
            monkeypatch.delenv("TORCHFT_CROSS_MEMORY", raising=False)
            source.send_checkpoint([1], 2, sent, TIMEOUT)
            receiver.recv_checkpoint(0, source.metadata(), 2, TIMEOUT)
            assert borrowed(receiver) == (0 if off == "source" else BYTES)
    monkeypatch.setenv("TORCHFT_CROSS_MEMORY", "perhaps")
    with pytest.raises(config.ConfigError, match="TORCHFT_CROSS_MEMORY"), transport():
        pass


def test_other_machines_and_other_users_are_told_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = state()
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        assert same(receiver.recv_checkpoint(0, over_tcp(source.metadata()), 1, TIMEOUT), sent)
        assert borrowed(receiver) == 0
        real = http_local.peer_process
        monkeypatch.setattr(http_lent, "peer_process", lambda sock: (real(sock)[0], os.geteuid() + 1))  # type: ignore[index]
        monkeypatch.setattr(Borrower, "of", lambda sock: Borrower(os.getpid()))  # it asks all the same
        assert same(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT), sent)
        assert borrowed(receiver) == 0


def test_memory_in_too_many_places_is_not_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.checkpointing.http_body.MAX_SPANS", 3)
    sent = state()
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        assert same(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT), sent)
        assert 0 < borrowed(receiver) < BYTES, "some requests are of few tensors, and some of many"


def test_many_small_tensors_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {f"w{i}": torch.randint(0, 256, (500 + i,), dtype=torch.uint8) for i in range(20_000)}
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        assert same(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT), sent)
        assert borrowed(receiver) == sum(t.nbytes for t in sent.values())


class Held:
    """A receiver that stops in the middle of its copying, until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        lock, left = threading.Lock(), after

        def copy(self_: Borrower, loan: Loan, into: Sequence[memoryview], arrived: Callable[[int], object]) -> bytes:
            nonlocal left
            with lock:
                left -= 1
                stop = left < 0
            if stop:
                self.begun.set()
                assert self.go_on.wait(60)
            return COPY(self_, loan, into, arrived)

        monkeypatch.setattr(Borrower, "copy", copy)

    def receive(self, receiver: HTTPTransport[Any], metadata: str) -> tuple[threading.Thread, list[Any]]:
        got: list[Any] = []

        def call() -> None:
            try:
                got.append(receiver.recv_checkpoint(0, metadata, 1, TIMEOUT))
            except Exception as e:
                got.append(e)

        thread = threading.Thread(target=call)
        thread.start()
        assert self.begun.wait(60)
        return thread, got


def test_a_source_that_goes_on_waits_for_no_copying_and_the_receiver_gets_what_was_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = state()
    before = {name: tensor.clone() for name, tensor in sent.items()}
    held = Held(monkeypatch, 5)
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        thread, got = held.receive(receiver, source.metadata())
        source.disallow_checkpoint()
        for tensor in sent.values():
            tensor.zero_()  # the optimizer writes what the receiver has been told to read
        held.go_on.set()
        thread.join(60)
        assert same(got[0], before)
        assert quiet(receiver), "nobody's memory is bad where a source goes on"
        assert 5 * CHUNK_SIZE <= borrowed(receiver) < BYTES


def test_what_was_copied_is_not_copied_once_more_for_the_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = state()
    held = Held(monkeypatch, 5)
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        thread, got = held.receive(receiver, source.metadata())
        # Two connections copy: one may be at its chunk still, and what each says of its last one be on its way.
        wait_until(lambda: CHUNKS - len(offered(source).needed()) >= 5, what="what was copied to be known")
        assert CHUNKS - len(offered(source).needed()) == 5, "the sixth was announced, and not taken"
        held.go_on.set()
        thread.join(60)
        assert same(got[0], sent)


def test_a_snapshot_that_is_withdrawn_meanwhile_is_not_received(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = state()
    held = Held(monkeypatch, 5)
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        thread, got = held.receive(receiver, source.metadata())
        source.send_checkpoint([1], 2, {name: tensor + 1 for name, tensor in sent.items()}, TIMEOUT)
        held.go_on.set()
        thread.join(60)
        assert isinstance(got[0], Exception), "half of one step and half of another is no state"
        assert same(receiver.recv_checkpoint(0, source.metadata(), 2, TIMEOUT), {k: v + 1 for k, v in sent.items()})


def test_an_abort_ends_the_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = state()
    held = Held(monkeypatch, 5)
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        thread, got = held.receive(receiver, source.metadata())
        receiver.abort()
        held.go_on.set()
        thread.join(60)
        assert isinstance(got[0], TransferAborted)
        assert borrowed(receiver) < 9 * CHUNK_SIZE, "two that had begun, and what was there"


def test_a_deadline_ends_the_copying_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = Deadline.expired
    copying = threading.local()

    def copy(self: Borrower, loan: Loan, into: Sequence[memoryview], arrived: Callable[[int], object]) -> bytes:
        copying.now = True
        return COPY(self, loan, into, arrived)

    monkeypatch.setattr(Borrower, "copy", copy)
    monkeypatch.setattr(Deadline, "expired", property(lambda self: getattr(copying, "now", False) or real.fget(self)))  # type: ignore[attr-defined]
    with transport() as source, transport() as receiver, caplog.at_level("INFO"):
        source.send_checkpoint([1], 1, state(), TIMEOUT)
        with pytest.raises(CheckpointTimeout, match="did not deliver within 60s"):
            receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
    assert "cannot be read" not in caplog.text


def test_a_source_whose_memory_is_not_what_it_announces_is_judged_by_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its addresses are wrong, its bytes are not: nothing is bad."""

    def elsewhere(views: Sequence[memoryview]) -> bytes:
        return write_spans([memoryview(bytearray(len(view))) for view in views])

    monkeypatch.setattr("torchft.checkpointing.http_body.write_spans", elsewhere)
    sent = state()
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        assert same(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT), sent)
        assert quiet(receiver)
        progress = receiver.last_receive
        assert progress is not None
        assert progress.received - BYTES <= 2 * CHUNK_SIZE, "each connection tries it once"


def test_addresses_of_nothing_end_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    page = ctypes.create_string_buffer(1)
    far = ctypes.addressof(page) ^ (1 << 46)

    def nowhere(views: Sequence[memoryview]) -> bytes:
        count = sum(map(len, views))
        return b"".join(n.to_bytes(8, "little") for n in (far, count))

    monkeypatch.setattr("torchft.checkpointing.http_body.write_spans", nowhere)
    sent = state()
    with transport(snapshot="lock") as source, transport() as receiver, caplog.at_level("INFO"):
        source.send_checkpoint([1], 1, sent, TIMEOUT)
        assert same(receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT), sent)
        assert quiet(receiver)
    assert os.strerror(errno.EFAULT) in caplog.text


def test_a_reader_that_leaves_without_a_word_has_not_taken_what_it_was_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(*_: object) -> bytes:
        raise SourceLost("it goes")

    monkeypatch.setattr(Borrower, "copy", leaves)
    with transport(snapshot="lock") as source, transport() as receiver:
        source.send_checkpoint([1], 1, state(), TIMEOUT)
        with pytest.raises(SourceLost):
            receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
        assert offered(source).bytes_sent == 0


def test_a_loan_is_read_from_its_beginning_to_its_end() -> None:
    draw = random.Random(7)
    for _ in range(200):
        memory = memoryview(bytearray(draw.randbytes(1000)))
        cuts = sorted(draw.sample(range(1, 1000), draw.randrange(20)))
        views = [memory[a:b] for a, b in zip([0, *cuts], [*cuts, 1000], strict=True)]
        loan = Loan(write_spans(views), 1000)
        at, start = 0, address_of(memory)
        while at < 1000:
            count = min(1000 - at, draw.randrange(1, 300))
            for address, length in loan.take(count):
                assert address == start + at
                at += length
                count -= length
            assert not count


@pytest.mark.parametrize("spans", [[], [(8, 99)], [(8, 101)], [(8, 50), (8, 0), (8, 50)], [(0, (1 << 64) - 1)]])
def test_a_loan_of_other_bytes_than_were_asked_for_is_none(spans: list[tuple[int, int]]) -> None:
    data = b"".join(n.to_bytes(8, "little") for span in spans for n in span)
    with pytest.raises(ManifestError, match="not the 100 bytes"):
        Loan(data, 100)


def test_the_length_of_an_answer_says_how_many_runs_of_memory_it_names() -> None:
    assert is_lent(16 + 16, 1)
    assert is_lent(16 * ACCEPTED_SPANS + 8 * 16, 8)
    for length, chunks in ((16, 1), (0, 1), (31, 1), (33, 1), (16 * (ACCEPTED_SPANS + 1) + 16, 1), (1 << 62, 8)):
        assert not is_lent(length, chunks)
