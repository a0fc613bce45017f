"""Sources that are not there, end or hang, and connections that break: what the receiver does and says."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import pytest
import torch

from tests.checkpointing.hostile_server import HostileServer
from tests.checkpointing.loopback import SHORT, TIMEOUT, address_of, over_tcp, port_of, transport
from tests.forked import ForkedProgram, child
from torchft.checkpointing import CheckpointTimeout, SourceLost
from torchft.checkpointing.chunks import CHUNK_SIZE
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.testing.faults import Link
from torchft.testing.ports import ReservedPort


def test_lost_connection_resumes_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two chunks all connections are reset, once."""
    with transport() as source, transport() as receiver, Link(address_of(source)) as link:
        state = {"w": torch.randint(0, 256, (8 * CHUNK_SIZE,), dtype=torch.uint8)}
        source.send_checkpoint([1], 1, state, TIMEOUT)
        real, cut = FetchProgress.landed, threading.Event()

        def landed(progress: FetchProgress, nbytes: int) -> None:
            real(progress, nbytes)
            if progress.done >= 2 * CHUNK_SIZE and not cut.is_set():
                cut.set()
                link.cut()

        monkeypatch.setattr(FetchProgress, "landed", landed)
        received = receiver.recv_checkpoint(0, f"torchft-http/1 http://{link.address}", 1, TIMEOUT)
        assert torch.equal(received["w"], state["w"])
        progress = receiver.last_receive
        assert progress is not None
        assert progress.retries >= 1
        unfinished = 2 + len(progress.taken_over)  # connections that ended in the middle of a chunk, at the most
        assert progress.received < (8 + unfinished) * CHUNK_SIZE, "what was there was asked for again"


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
def source_process(size: int) -> Iterator[tuple[ForkedProgram, str]]:
    with child(SOURCE, str(size)) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


@pytest.mark.parametrize("local", [True, False], ids=["local", "tcp"])
@pytest.mark.parametrize(("sign", "expected"), [(signal.SIGKILL, SourceLost), (signal.SIGSTOP, CheckpointTimeout)])
def test_source_process_dies_or_hangs_mid_transfer(
    sign: signal.Signals, expected: type[Exception], local: bool
) -> None:
    with source_process(64 << 20) as (process, metadata):
        metadata = metadata if local else over_tcp(metadata)
        live = torch.zeros(64 << 20, dtype=torch.uint8)

        def state_dict() -> object:
            process.send_signal(sign)
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


@pytest.mark.parametrize(
    ("pause", "timeout", "most"), [(b"0", 2.0, 7), (b"3600", 60.0, 1)], ids=["at once", "in an hour"]
)
def test_source_that_is_always_busy_is_not_asked_in_a_hurry_nor_beyond_the_end(
    pause: bytes, timeout: float, most: int
) -> None:
    asked = []

    def busy(request: bytes) -> list[bytes]:
        asked.append(request)
        return [b"HTTP/1.1 503 Busy\r\nRetry-After: %b\r\nContent-Length: 5\r\n\r\nfull\n" % pause, b""]

    with transport() as receiver, closing(HostileServer(busy)) as server:
        began = time.monotonic()
        with pytest.raises(CheckpointTimeout, match="was not ready with step 7 in time: full"):
            receiver.recv_checkpoint(0, f"torchft-http/1 {server.address}", 7, timedelta(seconds=timeout))
        assert time.monotonic() - began < 20
    assert 1 <= len(asked) <= most
