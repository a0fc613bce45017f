"""The register in a real etcd: who leads, by which epoch, and what was the last quorum; and how ``--ha`` names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.etcd import Etcd, needs_etcd
from torchft.coordination import LighthouseServer
from torchft.coordination.election import RegisterError
from torchft.coordination.etcd import EtcdRegister, parse_ha
from torchft.core.election import Holder, LastQuorum, LeaseOptions, Register, first_id


@needs_etcd
def test_the_register_does_what_it_promises(shared: Etcd) -> None:
    register = EtcdRegister(shared.url("register"), LeaseOptions(5.0))
    other = EtcdRegister(f"etcd://127.0.0.1:1,127.0.0.1:{shared.port}/register", LeaseOptions(5.0))
    try:
        assert register.look() == Register(0, None)
        with pytest.raises(RegisterError, match=r"127.0.0.1:1 "):
            other.look()
        assert other.look() == Register(0, None), "the next endpoint"
        won = register.campaign(Holder("me", "http://me:1", "me:2", 7, 0), expected=0)
        assert won is not None
        me, last = won
        assert last is None
        assert register.look() == other.look() == Register(7, me)
        you = Holder("you", "http://you:1", "you:2", 8, 0)
        assert other.campaign(you, expected=7) is None, "the seat is taken"
        assert register.renew(me.lease)
        other.vacate(me.lease)
        other.vacate(me.lease)
        assert not register.renew(me.lease)
        assert other.campaign(you, expected=6) is None, "the epoch is another one by now"
        assert other.look() == Register(7, None)
        quorum = LastQuorum(first_id(7) + 2, (("a", "h:1"), ("b", "")))
        assert register.remember(7, quorum)
        won = other.campaign(you, expected=7)
        assert won is not None
        assert won[1] == quorum, "who takes the seat is told"
        assert not register.remember(7, None), "its epoch is over"
        assert other.remember(8, None)
    finally:
        register.close()
        other.close()


@pytest.mark.parametrize(
    ("url", "endpoints", "job"),
    [
        ("etcd://a:2379", ("a:2379",), "default"),
        ("etcd://a:2379/", ("a:2379",), "default"),
        (" etcd://a:1,[::1]:2/my-job.1 ", ("a:1", "[::1]:2"), "my-job.1"),
    ],
)
def test_ha_is_read(url: str, endpoints: tuple[str, ...], job: str) -> None:
    assert parse_ha(url) == (endpoints, job)


@pytest.mark.parametrize(
    "url", ["", "etcd://", "a:2379", "http://a:2379", "etcd://a", "etcd://a:2379/x/y", "etcd://a:0"]
)
def test_other_texts_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"etcd|job"):
        LighthouseServer("127.0.0.1:0", 1, ha=url)


def test_two_records_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state_file"):
        LighthouseServer("127.0.0.1:0", 1, ha="etcd://127.0.0.1:1", state_file=tmp_path / "x")


def test_without_the_client_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd3gw", None)
    with pytest.raises(RuntimeError, match=r"pip install 'torchft\[etcd\]'"):
        LighthouseServer("127.0.0.1:0", 1, ha="etcd://127.0.0.1:1")
