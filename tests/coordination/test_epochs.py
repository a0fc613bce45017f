"""Epochs of a lighthouse with a state file, and how clients follow the newest one over several addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.coordination.standbys import MINUTE, ask, call, member
from torchft.coordination import LighthouseClient, LighthouseServer
from torchft.coordination.lighthouses import Lighthouses
from torchft.core.election import first_id
from torchft.runtime.deadline import Deadline
from torchft.testing.wait import wait_until


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[[str], LighthouseServer]]:
    """Lighthouses with state files, each on a port of its own."""
    servers = []

    def start(name: str, bind: str = "127.0.0.1:0") -> LighthouseServer:
        servers.append(
            LighthouseServer(bind, 1, join_timeout_ms=100, heartbeat_timeout_ms=1000, state_file=tmp_path / name)
        )
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("sessions", [True, False])
def test_a_lighthouse_that_lost_its_state_file_takes_a_higher_epoch_than_its_members_have_seen(
    alone: Callable[..., LighthouseServer], tmp_path: Path, caplog: pytest.LogCaptureFixture, sessions: bool
) -> None:
    for _ in range(4):
        alone("x").shutdown()
    server = alone("x")
    with member(server.address(), sessions=sessions) as m:
        assert ask(m) == 5
        server.shutdown()
        (tmp_path / "x").unlink()
        second = alone("x", f"127.0.0.1:{server.port}")
        assert second.epoch == 1
        assert ask(m) == 6
        assert second.epoch == 6
        assert "it has lost its state file" in caplog.text
    assert b'"epoch": 6' in (tmp_path / "x").read_bytes()


def test_a_deposed_lighthouse_is_refused(alone: Callable[[str], LighthouseServer], monkeypatch: Any) -> None:
    """One that does not know of the newer epoch, nor hears of it from its members."""
    for _ in range(3):
        alone("new").shutdown()
    new, old = alone("new"), alone("old")

    async def deaf(epoch: int) -> None:
        pass

    monkeypatch.setattr(old._seat, "told", deaf)
    client = LighthouseClient(f"{new.address()},{old.address()}", MINUTE)
    assert client.quorum("a", MINUTE).quorum_id >> 32 == 4
    new.shutdown()
    with pytest.raises((RuntimeError, TimeoutError)):
        client.quorum("a", timedelta(seconds=1))
    client.close()

    lone = Lighthouses(old.address())
    lone.admit(4)
    with member(old.address()) as m:
        session = m._lighthouse._session
        assert session is not None
        session.wait(Deadline(60))
        m._lighthouse._lighthouses.admit(4)
        session._call.cancel()  # as good as a cut: it connects again, and is told what it does not believe
        wait_until(lambda: session.refused, timeout=60)
        with pytest.raises((RuntimeError, TimeoutError), match="epoch 4 has begun"):
            m._quorum(0, 3, "", False, timedelta(seconds=1), 0)


def test_an_epoch_that_cannot_be_is_refused(alone: Callable[[str], LighthouseServer]) -> None:
    server = alone("x")
    with pytest.raises(grpc.RpcError, match="far beyond") as e:
        call(server, epoch=2**40)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert server.epoch == 1


def test_several_addresses_are_tried_until_one_answers(alone: Callable[[str], LighthouseServer]) -> None:
    server = alone("x")
    client = LighthouseClient(f"127.0.0.1:1, http://127.0.0.1:2,{server.address()}", MINUTE)
    assert client.quorum("a", MINUTE).quorum_id == first_id(1) + 1
    client.close()
    with pytest.raises(TimeoutError, match=r"127.0.0.1:1.*127.0.0.1:2.*TORCHFT_LIGHTHOUSE"):
        LighthouseClient("127.0.0.1:1,127.0.0.1:2", timedelta(milliseconds=300))


def test_addresses_that_are_none_are_refused() -> None:
    for text in ("", ",", "a", "a:1,b"):
        with pytest.raises(ValueError, match="is not an address"):
            LighthouseClient(text, MINUTE)


def test_a_named_leader_is_followed_and_garbage_is_not() -> None:
    lighthouses = Lighthouses("a:1,b:2")
    assert lighthouses.several
    lighthouses.leave("http://a:1", "http://c:3")
    assert lighthouses.current == "http://c:3"
    lighthouses.leave("http://a:1", "http://d:4")
    assert lighthouses.current == "http://c:3", "said of one that is not asked any more"
    lighthouses.leave("http://c:3")
    assert lighthouses.current == "http://a:1"
    for leader in ("", "nonsense", "http://a:1", "\0:-1"):
        at = lighthouses.current
        lighthouses.leave(at, leader)
        assert lighthouses.current in lighthouses.addresses
    lighthouses.close()
