"""Addresses: how they may be written, and which one of ours others are told."""

from __future__ import annotations

import logging
import socket

import pytest

from torchft.runtime import net
from torchft.runtime.net import (
    advertised_host,
    format_address,
    host_as_told,
    is_loopback,
    parse_address,
    split_bind,
)


@pytest.fixture(autouse=True)
def _no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_HOST", raising=False)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://head:29510", "head:29510"),
        ("http://head:29510/", "head:29510"),
        ("head:29510", "head:29510"),
        (" grpc://10.0.0.7:1 ", "10.0.0.7:1"),
        ("http://[::1]:65535", "[::1]:65535"),
    ],
)
def test_address_is_parsed(text: str, address: str) -> None:
    assert parse_address(text) == address


NO_ADDRESSES = ["", "head", "head:", ":29510", "head:http", "head:0", "head:65536", "head:-1", "head:²", "::1:29510"]
NO_ADDRESSES += ["https://head:29510", "http://head:29510/path", "http://"]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address") as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "port", "address"), [("head", 1, "http://head:1"), ("::1", 29510, "http://[::1]:29510")]
)
def test_formatted_address_parses_back(host: str, port: int, address: str) -> None:
    assert format_address(host, port) == address
    assert format_address("x", 1) != address
    assert "http://" + parse_address(address) == address


@pytest.mark.parametrize(
    ("bind", "host", "port"),
    [
        ("[::]:29510", "::", 29510),
        (":29510", "::", 29510),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("http://127.0.0.1:65535", "127.0.0.1", 65535),
        ("[::1]:0", "::1", 0),
    ],
)
def test_bind_is_split(bind: str, host: str, port: int) -> None:
    assert split_bind(bind) == (host, port)


@pytest.mark.parametrize("bind", ["", "0.0.0.0", "head:", "head:x", ":65536", ":-1", ":²"])
def test_bind_without_a_port_is_refused_by_name(bind: str) -> None:
    with pytest.raises(ValueError, match="is not a bind address") as caught:
        split_bind(bind)
    assert repr(bind) in str(caught.value)


def test_configured_host_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_HOST", "trainer-3")
    assert advertised_host(toward="127.0.0.1:1", given="127.0.0.1") == "trainer-3"


def test_given_host_is_used_if_it_resolves() -> None:
    assert advertised_host(toward="127.0.0.1:1", given="localhost") == "localhost"


def test_route_to_the_peer_is_used_if_the_given_host_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "resolves", lambda host: False)
    assert advertised_host(toward="http://127.0.0.1:29510", given="nowhere.invalid") == "127.0.0.1"


def test_route_needs_no_listener_and_sends_nothing() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert advertised_host(toward=f"127.0.0.1:{port}") == "127.0.0.1"


def test_address_comes_before_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "local_address_toward", lambda address: "192.0.2.9")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert advertised_host() == "192.0.2.9"


def test_host_name_is_used_when_there_is_no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "local_address_toward", lambda address: None)
    monkeypatch.setattr(net, "resolves", lambda host: host == "trainer-3")
    monkeypatch.setattr(socket, "gethostname", lambda: "trainer-3")
    assert advertised_host() == "trainer-3"


def test_loopback_is_the_last_resort_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(net, "local_address_toward", lambda address: None)
    monkeypatch.setattr(net, "resolves", lambda host: False)
    monkeypatch.setattr(socket, "gethostname", lambda: "lost")
    with caplog.at_level(logging.WARNING, logger="torchft.runtime.net"):
        assert advertised_host() == "127.0.0.1"
    assert "'lost'" in caplog.text
    assert "TORCHFT_HOST" in caplog.text


def test_an_address_or_name_of_this_machine_alone_is_told_as_others_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "local_address_toward", lambda address: "192.0.2.9")
    for host in ("127.0.0.1", "127.0.1.1", "::1", "[::1]", "localhost"):
        assert host_as_told(host, toward="192.0.2.1:29510") == "192.0.2.9"


def test_an_address_that_somebody_chose_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "local_address_toward", lambda address: "192.0.2.9")
    for host in ("192.0.2.7", "2001:db8::7", "nowhere.invalid"):
        assert host_as_told(host) == host


def test_a_name_of_this_machine_in_another_network_leads_others_there(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"node1": ["192.0.2.9"], "node1.lan": ["192.0.2.9"], "node1-ib": ["198.51.100.9"], "node2": ["192.0.2.8"]}
    monkeypatch.setattr(net, "_addresses_of", lambda host: known.get(host, []))
    monkeypatch.setattr(net, "_is_ours", lambda address: address.endswith(".9"))
    monkeypatch.setattr(net, "local_address_toward", lambda address: "203.0.113.9")
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node1.lan")
    told = {host: host_as_told(host) for host in known}
    assert told["node1-ib"] == "198.51.100.9"  # what another machine makes of the name is not known
    assert told["node1"] == told["node1.lan"] == "203.0.113.9"
    assert told["node2"] == "node2"


def test_the_short_form_of_this_machines_name_is_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "_addresses_of", lambda host: [] if host == "203.0.113.9" else ["192.0.2.9"])
    monkeypatch.setattr(net, "_is_ours", lambda address: address.endswith(".9"))
    monkeypatch.setattr(socket, "gethostname", lambda: "node1.lan")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node1.lan")
    monkeypatch.setenv("TORCHFT_HOST", "203.0.113.9")
    assert host_as_told("node1") == "203.0.113.9"
    assert host_as_told("NODE1.lan") == "203.0.113.9"


def test_on_one_machine_the_address_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "local_address_toward", lambda address: "::1")
    assert host_as_told("127.0.0.1") == "127.0.0.1"


def test_a_name_is_loopback_if_all_it_leads_to_is() -> None:
    assert is_loopback("localhost")
    assert is_loopback("[::1]")
    assert not is_loopback("192.0.2.1")
    assert not is_loopback("nowhere.invalid")
    assert not is_loopback("a" * 64), "no name, which the resolver says in another way"
