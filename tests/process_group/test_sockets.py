"""Only a group's own connections are shut down."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from torchft.process_group.sockets import device_address, shut_down_connections, unpace_connections
from torchft.runtime.loopback import paces


def _published(host: str, family: int, port: int, address: bytes) -> bytes:
    if family == socket.AF_INET:
        sockaddr = struct.pack("=H", family) + struct.pack("!H", port) + address
    else:
        sockaddr = struct.pack("=H", family) + struct.pack("!HI", port, 0) + address
    sockaddr = sockaddr.ljust(128, b"\0")
    return struct.pack("=Q", len(host)) + host.encode() + struct.pack("=Q", len(sockaddr)) + sockaddr


@pytest.mark.parametrize("host", ["a", "a-much-longer-host-name"])
def test_an_ipv4_device_is_read(host: str) -> None:
    assert device_address(_published(host, socket.AF_INET, 4711, bytes([10, 0, 0, 7]))) == ("10.0.0.7", 4711)


def test_an_ipv6_device_is_read_and_a_mapped_one_is_ipv4() -> None:
    assert device_address(_published("h", socket.AF_INET6, 4711, bytes(15) + b"\1")) == ("::1", 4711)
    mapped = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 7])
    assert device_address(_published("h", socket.AF_INET6, 4711, mapped)) == ("10.0.0.7", 4711)


@pytest.mark.parametrize("junk", [b"", b"\1", b"\xff" * 8, b"\0" * 40, b"\xff" * 200])
def test_what_is_not_an_address_is_none(junk: bytes) -> None:
    assert device_address(junk) is None


def _connect(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    return client, accepted


def test_accepted_and_opened_connections_end_and_others_do_not() -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    pairs = [_connect(server) for server in servers]
    try:
        ours, theirs, stranger = (server.getsockname() for server in servers)
        assert ours != stranger
        assert shut_down_connections([ours], [theirs]) == 2
        assert pairs[0][0].recv(1) == b""  # accepted by our device: its other end reads the end
        assert pairs[1][1].recv(1) == b""  # opened by us to their device
        pairs[2][0].sendall(b"x")
        assert pairs[2][1].recv(1) == b"x"
        again = _connect(servers[0])  # the listening socket was left alone
        for s in again:
            s.close()
    finally:
        for s in [*servers, *(s for pair in pairs for s in pair)]:
            s.close()


def test_looking_for_connections_leaks_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert shut_down_connections([("127.0.0.1", 1)], [("127.0.0.1", 2)]) == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_groups_connections_on_this_machine_are_not_paced_and_others_keep_what_they_have() -> None:
    if not paces():
        pytest.skip("connections are not paced here by default")
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    pairs = [_connect(server) for server in servers]
    try:
        ours, theirs, _ = (server.getsockname() for server in servers)
        assert unpace_connections([ours], [("192.0.2.1", theirs[1])]) == 0, "nobody else is on this machine"
        assert unpace_connections([ours], [theirs]) == 2
        assert [paces(s) for pair in pairs for s in pair] == [True, False, False, True, True, True]
    finally:
        for s in [*servers, *(s for pair in pairs for s in pair)]:
            s.close()
