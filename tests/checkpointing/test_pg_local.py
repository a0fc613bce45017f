"""The local way of a process-group transfer: when it is taken, when it is not, and how it ends."""

from __future__ import annotations

import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import same
from tests.checkpointing.test_pg_transport import CPU, LOCAL, TIMEOUT, groups
from torchft.checkpointing import CheckpointError, ManifestError, PGTransport, pg_transport
from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.pg_local import LocalOffer, LocalWay
from torchft.checkpointing.pg_stream import Prologue
from torchft.checkpointing.snapshot import host_run
from torchft.checkpointing.transport import SourceLost, StepNotServed
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.runtime.deadline import Deadline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such addresses")

PLENTY = 60.0
WAY = LocalOffer.way


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(1 << 20), "small": torch.arange(7)}


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The address of somebody who answers every connection with these bytes and closes it."""
    name = f"test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0" + name.encode())
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock, suppress(OSError):
                    sock.recv(1 << 16)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"unix:@{name}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PLENTY)


def told(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, list[str]], list[str]]) -> None:
    """Receivers are told what ``change`` makes of the number of the receiver and of address, token and name."""
    lock, count = threading.Lock(), 0

    def way(self: LocalOffer) -> tuple[bytes, str]:
        nonlocal count
        said, receiver = WAY(self)
        with lock:
            count += 1
            return " ".join(change(count, said.decode().split())).encode(), receiver

    monkeypatch.setattr(LocalOffer, "way", way)


def elsewhere(_: int, way: list[str]) -> list[str]:
    return [way[0][:-16] + secrets.token_hex(8), *way[1:]]


def moved(pgs: list[ProcessGroupGloo], pool: ThreadPoolExecutor) -> None:
    """From member 0 to all others."""
    sent = state()
    transports: list[PGTransport[Any]] = [PGTransport(pg, TIMEOUT, CPU, local_from=LOCAL) for pg in pgs]
    ranks = list(range(1, len(pgs)))
    sending = pool.submit(transports[0].send_checkpoint, ranks, 5, sent, TIMEOUT)
    receiving = [pool.submit(transports[i].recv_checkpoint, 0, "<n/a>", 5, TIMEOUT) for i in ranks]
    assert all(same(future.result(PLENTY), sent) for future in receiving)
    sending.result(PLENTY)


def test_one_receiver_is_on_this_machine_and_one_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told(monkeypatch, lambda n, way: way if n == 1 else elsewhere(n, way))
    with caplog.at_level("INFO", "torchft.checkpointing.pg_transport"), groups(3) as pgs, ThreadPoolExecutor(3) as pool:
        moved(pgs, pool)
    lines = [r.getMessage() for r in caplog.records if "received step 5 from replica rank 0" in r.getMessage()]
    assert sorted("on this machine" in line for line in lines) == [False, True]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]  # that a source is elsewhere is nothing special


def test_who_listens_there_and_is_not_the_source_gets_nothing_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"\x80\x04garbage\r\n\r\n", b"")
    with groups(2) as pgs, ThreadPoolExecutor(3) as pool:
        for answer in answers:
            with answering(answer) as address:
                told(monkeypatch, lambda _, way, to=address: [to, *way[1:]])  # type: ignore[misc]
                moved(pgs, pool)
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum("the state comes over the process group" in line for line in lines) == 2  # those that said something


def test_the_token_is_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    told(monkeypatch, lambda _, way: [way[0], "0" * 32, way[2]])
    with groups(2) as pgs, ThreadPoolExecutor(3) as pool:
        moved(pgs, pool)
    assert any("this source asks for a token" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("way", [b"", b"http://10.0.0.1:80 a b", b"unix:@A " + b"0" * 32 + b" " + b"0" * 32, b"\xff"])
def test_another_way_is_refused(way: bytes) -> None:
    with pytest.raises(ManifestError, match="a way that this side does not know"):
        LocalWay.parse(way)


def test_a_way_is_short() -> None:
    with pytest.raises(ManifestError, match="60000 bytes of an address"):
        Prologue.unpack(Prologue(3, 100, 100, way=60000).pack())
    assert Prologue.unpack(Prologue(3, 100, 100, way=100).pack()).way == 100


class Half:
    """A transfer by the local way whose receiver stands where it has the manifest and no data."""

    def __init__(self, pgs: list[ProcessGroupGloo], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()

        class Slow(Destination):
            def __init__(prepared, *args: Any) -> None:
                self.there.set()
                assert self.go_on.wait(PLENTY)
                super().__init__(*args)

        monkeypatch.setattr(pg_transport, "Destination", Slow)
        self.source: PGTransport[Any] = PGTransport(pgs[0], TIMEOUT, CPU, local_from=LOCAL)
        self.receiver: PGTransport[Any] = PGTransport(pgs[1], TIMEOUT, CPU, local_from=LOCAL)
        self.sending: Future[None] = pool.submit(self.source.send_checkpoint, [1], 5, state(), TIMEOUT)
        self.receiving = pool.submit(self.receiver.recv_checkpoint, 0, "<n/a>", 5, TIMEOUT)
        assert self.there.wait(PLENTY)


def given_up(what: str, transport: PGTransport[Any], group: ProcessGroupGloo) -> str:
    """Aborts one of the two, and returns the reason that its side then gives."""
    if what == "transport":
        transport.abort("a member died")
        return "a member died"
    group.abort()
    return "the process group was given up"


@pytest.mark.parametrize("what", ["transport", "group"])
def test_an_abort_at_the_source_ends_both(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with groups(2) as pgs, ThreadPoolExecutor(2) as pool:
        half = Half(pgs, pool, monkeypatch)
        try:
            reason = given_up(what, half.source, pgs[0])
            with pytest.raises(CheckpointError, match=f"the transfer was aborted: {reason}"):
                half.sending.result(PLENTY)
        finally:
            half.go_on.set()
        with pytest.raises(SourceLost, match="replica rank 0"):
            half.receiving.result(PLENTY)


@pytest.mark.parametrize("what", ["transport", "group"])
def test_an_abort_at_the_receiver_ends_both(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with groups(2) as pgs, ThreadPoolExecutor(2) as pool:
        half = Half(pgs, pool, monkeypatch)
        try:
            reason = given_up(what, half.receiver, pgs[1])
            with pytest.raises(CheckpointError, match="replica rank 1, on this machine, closed its connection"):
                half.sending.result(PLENTY)
        finally:
            half.go_on.set()
        with pytest.raises(CheckpointError, match=f"the transfer was aborted: {reason}"):
            half.receiving.result(PLENTY)


def test_nobody_is_served_when_the_source_has_returned() -> None:
    manifest, sources = describe(state(), False)
    offer = LocalOffer(5, manifest, host_run(sources), Deadline(PLENTY))
    address = offer.way()[0].decode().split()[0]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PLENTY)
        sock.connect(b"\0" + address.removeprefix("unix:@").encode())
        offer.close()
        try:
            assert not sock.recv(1)
        except ConnectionResetError:
            pass  # it had not been accepted yet
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(b"\0" + address.removeprefix("unix:@").encode())


def test_another_step_than_the_one_asked_for_is_refused_first() -> None:
    with groups(2) as pgs, ThreadPoolExecutor(1) as pool:
        source: PGTransport[Any] = PGTransport(pgs[0], TIMEOUT, CPU, local_from=LOCAL)
        receiver: PGTransport[Any] = PGTransport(pgs[1], TIMEOUT, CPU)
        sending = pool.submit(source.send_checkpoint, [1], 5, state(), timedelta(seconds=30))
        with pytest.raises(StepNotServed, match="step 6 was asked for, but replica rank 0 sends step 5"):
            receiver.recv_checkpoint(0, "<n/a>", 6, TIMEOUT)
        source.abort("the receiver asked for another step")
        pgs[0].abort()
        with pytest.raises(CheckpointError, match="asked for another step"):
            sending.result(PLENTY)
