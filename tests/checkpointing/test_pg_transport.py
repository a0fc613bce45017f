"""The process-group transport beyond the conformance suite: several receivers, foreign senders, dying processes."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.forked import ForkedProgram
from torchft.checkpointing import CheckpointError, ManifestError, PGTransport, StepNotServed, TransferAborted
from torchft.checkpointing.pg_stream import BUCKET, PROLOGUE_BYTES, ChunkHasher, Prologue, buckets
from torchft.process_group.gloo import ProcessGroupGloo

TIMEOUT = timedelta(seconds=60)
CPU = torch.device("cpu")
LOCAL, GROUP = 0, sys.maxsize
"""``local_from``: any state goes by the local way, or none."""
SIZES = (1, 100, (1 << 20) - 1, 1 << 20, BUCKET - 1, BUCKET, BUCKET + 1, 3 * BUCKET)


@contextmanager
def groups(count: int) -> Iterator[list[ProcessGroupGloo]]:
    """So many members of one process group, in this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [ProcessGroupGloo(TIMEOUT) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool:
            address = f"127.0.0.1:{store.port}/pg"
            list(pool.map(lambda i: members[i].configure(address, f"r{i}", i, count), range(count)))
        yield members
    finally:
        for member in members:
            member.shutdown()


def test_several_receivers_get_the_same_state() -> None:
    state = {"w": torch.randn(1 << 20), "small": [torch.randn(10) for _ in range(50)]}
    with groups(3) as pgs, ThreadPoolExecutor(3) as pool:
        transports: list[PGTransport[Any]] = [PGTransport(pg, TIMEOUT, CPU) for pg in pgs]
        sending = pool.submit(transports[1].send_checkpoint, [0, 2], 5, state, TIMEOUT)
        received = [pool.submit(transports[i].recv_checkpoint, 1, "<n/a>", 5, TIMEOUT) for i in (0, 2)]
        sending.result(60)
        for future in received:
            got = future.result(60)
            assert torch.equal(got["w"], state["w"])
            assert all(torch.equal(a, b) for a, b in zip(got["small"], state["small"], strict=True))


def test_metadata_is_not_used() -> None:
    with groups(1) as pgs:
        assert PGTransport(pgs[0], TIMEOUT, CPU).metadata() == "<n/a>"


def pickled() -> list[torch.Tensor]:
    data = torch.frombuffer(bytearray(pickle.dumps({"w": 1})), dtype=torch.uint8)
    return [torch.tensor([len(data)]).view(torch.uint8), data]


def oversized() -> list[torch.Tensor]:
    packed = bytearray(Prologue(3, 100, 100).pack())
    packed[20:28] = (1 << 40).to_bytes(8, "little")
    return [torch.frombuffer(packed, dtype=torch.uint8)]


def not_json() -> list[torch.Tensor]:
    prologue = torch.frombuffer(bytearray(Prologue(3, 40, 100).pack()), dtype=torch.uint8)
    return [prologue, torch.full((40,), 65, dtype=torch.uint8)]


def other_version() -> list[torch.Tensor]:
    packed = bytearray(Prologue(3, 100, 100).pack())
    packed[8] = 99
    return [torch.frombuffer(packed, dtype=torch.uint8)]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (pickled, "not a torchft checkpoint"),
        (oversized, "announces"),
        (not_json, "not JSON"),
        (other_version, "version 99"),
    ],
)
def test_foreign_sender_is_refused(messages: Any, expected: str) -> None:
    with groups(2) as pgs:
        sent = [(m, pgs[0].send([m], 1, 1)) for m in messages()[:1]]
        sent += [(m, pgs[0].send([m], 1, 1)) for m in messages()[1:] if expected == "not JSON"]
        receiver: PGTransport[Any] = PGTransport(pgs[1], TIMEOUT, CPU)
        with pytest.raises(ManifestError, match=expected):
            receiver.recv_checkpoint(0, "<n/a>", 3, TIMEOUT)
        assert sent


def test_receiver_that_is_gone_does_not_cost_the_other_its_state() -> None:
    state = {"w": torch.randn(4 << 20)}

    class LosesRank2:
        """A group whose sends to rank 2 fail."""

        def __init__(self, pg: ProcessGroupGloo) -> None:
            self._pg = pg

        def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> dist.Work:
            if dst_rank == 2:
                raise RuntimeError("connection closed by peer")
            return self._pg.send(tensors, dst_rank, tag)

        def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> dist.Work:
            return self._pg.recv(tensors, src_rank, tag)

    with groups(2) as pgs, ThreadPoolExecutor(1) as pool:
        receiver: PGTransport[Any] = PGTransport(pgs[1], TIMEOUT, CPU)
        source: PGTransport[Any] = PGTransport(LosesRank2(pgs[0]), TIMEOUT, CPU)
        receiving = pool.submit(receiver.recv_checkpoint, 0, "<n/a>", 1, TIMEOUT)
        with pytest.raises(CheckpointError, match="replica rank 2: connection closed"):
            source.send_checkpoint([1, 2], 1, state, TIMEOUT)
        assert torch.equal(receiving.result(60)["w"], state["w"])


ENDING = """
import os, signal, sys, threading, torch
from datetime import timedelta
from torchft.checkpointing import PGTransport, http_download, pg_transport
from torchft.process_group.gloo import ProcessGroupGloo
t = timedelta(seconds=120)
live = torch.zeros(int(sys.argv[2]), dtype=torch.uint8)
def end(*_):
    os.kill(os.getpid(), int(sys.argv[3]))
    threading.Event().wait()  # the signal may need a moment
pg_transport.ChunkHasher.update = http_download.Download._landed = end  # some data has come, and no more is taken
pg = ProcessGroupGloo(t)
pg.configure(sys.argv[1], "stops", 2, 3)
PGTransport(pg, t, torch.device("cpu"), lambda: {"w": live}).recv_checkpoint(0, "<n/a>", 7, t)
"""


@pytest.mark.parametrize(
    ("signalled", "local_from"),
    [(signal.SIGSTOP, GROUP), (signal.SIGSTOP, LOCAL), (signal.SIGKILL, LOCAL)],
    ids=["stopped-group", "stopped-local", "killed-local"],
)
def test_receiver_that_ends_does_not_cost_the_other_its_state(signalled: signal.Signals, local_from: int) -> None:
    """It stops in the middle, with its connection open: only the source's own wait for it is left. Or it is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}/pg"
    size = 192 << 20
    state = {
        "w": torch.full((size,), 3, dtype=torch.uint8),
        "small": [torch.full((1000,), float(i)) for i in range(99)],
    }
    command = [sys.executable, "-c", ENDING, address, str(size), str(int(signalled))]
    process = ForkedProgram(command)
    pgs = [ProcessGroupGloo(timedelta(seconds=120)) for _ in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: pgs[i].configure(address, f"r{i}", i, 3), range(2)))
            source: PGTransport[Any] = PGTransport(pgs[0], TIMEOUT, CPU, local_from=local_from)
            receiver: PGTransport[Any] = PGTransport(pgs[1], TIMEOUT, CPU)
            sending = pool.submit(source.send_checkpoint, [2, 1], 7, state, TIMEOUT)
            got = pool.submit(receiver.recv_checkpoint, 0, "<n/a>", 7, TIMEOUT).result(45)
            assert torch.equal(got["w"], state["w"])
            assert all(torch.equal(a, b) for a, b in zip(got["small"], state["small"], strict=True))
            if signalled == signal.SIGKILL:
                with pytest.raises(CheckpointError, match="replica rank 2, on this machine, closed its connection"):
                    sending.result(45)  # the timeout is 60
                return
            process.wait_until_stopped()
            assert not sending.done()
            source.abort("a member died")
            if local_from == GROUP:
                pgs[0].abort()
            with pytest.raises(TransferAborted, match="a member died"):
                sending.result(45)
    finally:
        process.kill()
        process.wait()
        for pg in pgs:
            pg.shutdown()


def test_a_state_for_nobody_is_sent_to_nobody() -> None:
    with groups(1) as (pg,):
        PGTransport(pg, TIMEOUT, CPU).send_checkpoint([], 7, {"w": torch.ones(3)}, TIMEOUT)


MEMBER = """
import sys, torch
from datetime import timedelta
from torchft.checkpointing import PGTransport
from torchft.process_group.gloo import ProcessGroupGloo
t = timedelta(seconds=120)
pg = ProcessGroupGloo(t)
pg.configure(sys.argv[1], "source", 0, 2)
transport = PGTransport(pg, t, torch.device("cpu"), local_from=int(sys.argv[2]))
transport.send_checkpoint([1], 7, {"w": torch.ones(256 << 20, dtype=torch.uint8)}, t)
"""


@pytest.mark.parametrize("local_from", [GROUP, LOCAL], ids=["group", "local"])
def test_source_process_dies_mid_transfer(local_from: int) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}/pg"
    process = ForkedProgram([sys.executable, "-c", MEMBER, address, str(local_from)])
    pg = ProcessGroupGloo(timedelta(seconds=120))
    try:
        pg.configure(address, "receiver", 1, 2)

        def state_dict() -> object:
            process.kill()
            return {}

        receiver: PGTransport[Any] = PGTransport(pg, TIMEOUT, CPU, state_dict)
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="replica rank 0"):
            receiver.recv_checkpoint(0, "<n/a>", 7, TIMEOUT)
        assert time.monotonic() - began < 40  # the timeout is 60
    finally:
        process.kill()
        process.wait()
        pg.shutdown()


def test_log_lines_keep_their_shape(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "torchft.checkpointing"), groups(2) as pgs, ThreadPoolExecutor(1) as pool:
        source: PGTransport[Any] = PGTransport(pgs[0], TIMEOUT, CPU)
        receiver: PGTransport[Any] = PGTransport(pgs[1], TIMEOUT, CPU)
        sending = pool.submit(source.send_checkpoint, [1], 1, {"w": torch.ones(1000)}, TIMEOUT)
        receiver.recv_checkpoint(0, "<n/a>", 1, TIMEOUT)
        sending.result(60)
    lines = [r.getMessage() for r in caplog.records if r.name == "torchft.checkpointing.pg_transport"]
    for shape in ("preparing state_dict took ", "send manifest took ", "send tensors took "):
        assert any(line.startswith(shape) for line in lines), shape
    assert any("received step 1 from replica rank 0" in line and "verified" in line for line in lines)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([1, 100, (1 << 20) - 1, 1 << 20, BUCKET - 1, BUCKET, BUCKET + 1, 3 * BUCKET]), max_size=9)
)
def test_buckets_cover_the_data_once_and_in_order(extents: Sequence[int]) -> None:
    starts = [sum(extents[:i]) for i in range(len(extents))]
    position = 0
    for bucket in buckets(extents):
        assert bucket.start == position
        assert 0 < bucket.stop - bucket.start <= BUCKET
        if bucket.extent >= 0:
            assert bucket.start == starts[bucket.extent] + bucket.offset
            assert bucket.stop <= starts[bucket.extent] + extents[bucket.extent]
        position = bucket.stop
    assert position == sum(extents)


@settings(deadline=None, max_examples=100)
@given(st.binary(min_size=PROLOGUE_BYTES, max_size=PROLOGUE_BYTES))
def test_arbitrary_prologues_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Prologue.unpack(data)


def test_chunk_hashes_do_not_depend_on_how_data_is_portioned() -> None:
    data = memoryview(os.urandom((17 << 20) + 3))
    whole, parts = ChunkHasher(), ChunkHasher()
    whole.update([data])
    for at in range(0, len(data), 1_000_003):
        parts.update([data[at : at + 1_000_003]])
    digests = whole.finish()
    assert digests == parts.finish()
    assert len(digests) == 3 * 16


def test_all_receivers_are_told_that_there_is_no_state_even_if_one_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.checkpointing.pg_transport._REFUSAL", 60.0)
    with groups(4) as pgs, ThreadPoolExecutor(4) as pool:
        transports: list[PGTransport[Any]] = [PGTransport(pg, TIMEOUT, CPU) for pg in pgs]
        declining = pool.submit(transports[0].decline, 7, "x" * 5000, [3, 1, 2])
        for ranks in ((1, 2), (3,)):
            waiting = [pool.submit(transports[rank].recv_checkpoint, 0, "<n/a>", 7, TIMEOUT) for rank in ranks]
            for one in waiting:
                with pytest.raises(StepNotServed, match=r"replica rank 0 could not offer it: x{1000}$"):
                    one.result(60)
        declining.result(60)


def test_a_receiver_that_has_got_a_part_of_a_state_is_sent_no_refusal() -> None:
    """Gloo would end its process: it waits for another message."""
    sent: list[int] = []

    class Breaking:
        """The prologue goes out, and what follows does not."""

        def __init__(self, group: ProcessGroupGloo) -> None:
            self._group = group

        def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> dist.Work:
            sent.append(tensors[0].numel())
            if len(sent) > 1:
                raise RuntimeError("broken")
            return self._group.send(tensors, dst_rank, tag)

        recv = None

    with groups(2) as pgs:
        source: PGTransport[Any] = PGTransport(Breaking(pgs[0]), TIMEOUT, CPU)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="broken"):
            source.send_checkpoint([1], 7, {"w": 1}, TIMEOUT)
        assert len(sent) == 2
        source.decline(7, "it broke", [1])
        assert len(sent) == 2
        source.decline(8, "the next step is another matter", [1])
        assert len(sent) == 3
