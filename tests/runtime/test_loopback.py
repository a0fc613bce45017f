"""Only connections that stay on this machine are freed of pacing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from torchft.runtime.loopback import paces, unpace

_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def _pacing() -> str:
    """A congestion control that paces and that this process may choose."""
    allowed = _ALLOWED.read_text().split() if _ALLOWED.exists() else []
    if "bbr" not in allowed:
        pytest.skip("this machine has no bbr, the congestion control that paces")
    return "bbr"


@contextmanager
def _connection(source: str, family: socket.AddressFamily = socket.AF_INET) -> Iterator[socket.socket]:
    with ExitStack() as stack:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        server = stack.enter_context(socket.create_server((host, 0), family=family))
        client = stack.enter_context(socket.create_connection(server.getsockname()[:2], 30, (source, 0)))
        stack.enter_context(server.accept()[0])
        yield client


@pytest.mark.parametrize(("family", "source"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_connection_on_this_machine_is_freed_once(family: socket.AddressFamily, source: str) -> None:
    control = _pacing().encode()
    try:
        connection = _connection(source, family)
        with connection as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
            assert paces(client)
            assert unpace(client)
            assert not paces(client)
            assert not unpace(client)
    except OSError as e:
        if family != socket.AF_INET6:
            raise
        pytest.skip(f"no IPv6 here: {e}")


def test_a_connection_between_two_addresses_keeps_what_it_has() -> None:
    control = _pacing().encode()
    with _connection("127.0.0.2") as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
        assert not unpace(client)
        assert paces(client)


def test_what_has_no_other_end_is_left_alone() -> None:
    here, there = socket.socketpair()
    with here, there, socket.socket() as unconnected:
        assert not unpace(here)
        assert not unpace(unconnected)
