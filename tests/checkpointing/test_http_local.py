"""The Unix socket of a source: used by receivers on its machine, and by nobody else's harm."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpointing.loopback import SHORT, TIMEOUT, over_tcp, port_of, transport
from torchft.checkpointing import CheckpointError, SourceLost, http_server
from torchft.checkpointing.http_local import is_local, local_socket
from torchft.testing.ports import ReservedPort

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names for sockets without files")

NOBODY = "unix:@torchft-http-1-0123456789abcdef"


def test_a_receiver_on_this_machine_comes_by_the_unix_socket(caplog: pytest.LogCaptureFixture) -> None:
    with transport() as source, transport() as receiver:
        local = source.metadata().split(" ")[1]
        assert is_local(local)
        assert f"-{port_of(source)}-" in local
        state = {"w": torch.arange(1 << 20)}
        source.send_checkpoint([1], 1, state, TIMEOUT)
        with caplog.at_level("INFO"):
            received = receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
        assert torch.equal(received["w"], state["w"])
        assert f"received step 1 from replica rank 0 ({local})" in caplog.text


def test_what_only_another_machine_knows_is_passed_over() -> None:
    with transport() as source, transport() as receiver:
        source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
        metadata = source.metadata().replace(source.metadata().split(" ")[1], NOBODY)
        assert receiver.recv_checkpoint(0, metadata, 1, TIMEOUT) == {"x": 1}
        with ReservedPort() as dead, pytest.raises(SourceLost, match="TORCHFT_HOST") as failure:
            receiver.recv_checkpoint(0, f"torchft-http/1 {NOBODY} http://127.0.0.1:{dead.port}", 1, SHORT)
        assert "unix" not in str(failure.value), "what is of no use elsewhere only confuses"


def test_a_system_without_such_names_serves_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "listen_locally", lambda *_: None)
    with transport() as source, transport() as receiver:
        assert source.metadata() == over_tcp(source.metadata())
        source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
        assert receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT) == {"x": 1}


def test_the_way_can_be_switched_off() -> None:
    with transport(local=False) as source, transport() as receiver:
        assert source.metadata() == f"torchft-http/1 http://127.0.0.1:{port_of(source)}"
        source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
        assert receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT) == {"x": 1}


def test_the_token_is_asked_for_there_too() -> None:
    with transport(token="s3cret") as source, transport(token="wrong") as receiver:
        source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
        with pytest.raises(CheckpointError, match="asks for a token"):
            receiver.recv_checkpoint(0, " ".join(source.metadata().split(" ")[:2]), 1, TIMEOUT)


def test_it_ends_with_the_transport_and_leaves_nothing() -> None:
    before = open_sockets()
    with transport() as source, transport() as receiver:
        local = source.metadata().split(" ")[1]
        source.send_checkpoint([1], 1, {"w": torch.ones(1 << 20)}, TIMEOUT)
        silent, target = local_socket(local)
        with silent:
            silent.connect(target)  # one that never says anything
            receiver.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
            source.shutdown()
            silent.settimeout(60)
            assert silent.recv(1) == b"", "who is connected is cut off"
    late, target = local_socket(local)
    with late, pytest.raises(ConnectionRefusedError):
        late.connect(target)
    assert open_sockets() <= before


def open_sockets() -> set[str]:
    """By inode, those of this process."""
    found: set[str] = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(fd)
        except OSError:
            continue  # the folder itself, or closed meanwhile
        if name.startswith("socket:"):
            found.add(name)
    return found


def test_addresses_of_another_form_are_refused() -> None:
    for address in ("unix:/tmp/x", "unix:@", "unix:@" + "a" * 91, "unix:@a\0b", "http://h:1"):
        assert not is_local(address)
        with pytest.raises(OSError, match="no address here"):
            local_socket(address)
    with transport() as receiver, pytest.raises(CheckpointError, match="no usable address"):
        receiver.recv_checkpoint(0, "torchft-http/1 unix:/etc/passwd", 1, SHORT)


def test_a_source_that_does_not_accept_is_reached_by_its_port() -> None:
    """A listener whose queue is full answers at once that it is, and the next address is tried."""
    with transport() as source, transport() as receiver, socket.socket(socket.AF_UNIX) as full:
        full.bind(b"\0torchft-http-1-" + os.urandom(8).hex().encode())
        full.listen(0)
        address = f"unix:@{full.getsockname()[1:].decode()}"
        waiting = [local_socket(address)[0] for _ in range(4)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(full.getsockname())
            source.send_checkpoint([1], 1, {"x": 1}, TIMEOUT)
            metadata = f"torchft-http/1 {address} {over_tcp(source.metadata()).split(' ')[1]}"
            assert receiver.recv_checkpoint(0, metadata, 1, TIMEOUT) == {"x": 1}
        finally:
            for sock in waiting:
                sock.close()
