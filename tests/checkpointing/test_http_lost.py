"""Sources that are not there, end or hang, and connections that break: what the receiver does and says."""

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

import pytest
import torch

from tests.checkpointing.loopback import SHORT, TIMEOUT, port_of, transport
from torchft.checkpointing import CheckpointTimeout, SourceLost
from torchft.checkpointing.chunks import CHUNK_SIZE
from torchft.testing.ports import ReservedPort


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
