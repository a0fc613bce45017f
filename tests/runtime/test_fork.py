"""Forked children let go of registered sockets, and of no others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from torchft.runtime import fork
from torchft.runtime.fork import Endpoints, close_in_children, close_in_children_fd

_PARENT = """
import json, multiprocessing, os, signal, socket, sys, threading

from torchft.runtime.fork import close_in_children, close_in_children_fd

kind, by_number, by_name, free = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
socket.setdefaulttimeout(60)  # it must not make sockets non-blocking
opened = [socket.create_connection(("127.0.0.1", port)) for port in (by_number, by_name)]
unregistered = socket.create_connection(("127.0.0.1", free))
listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
by_port, held = listening
registration = close_in_children(own=[by_port.getsockname()[1]], others=[("127.0.0.1", by_number)])
registration.add(others=[f"localhost:{by_name}"])
close_in_children_fd(held)
forgotten = close_in_children(others=[("127.0.0.1", free)])
forgotten.forget()
print(json.dumps([s.getsockname()[1] for s in listening]), flush=True)
accepted, _ = by_port.accept()

def child(generations):
    if generations:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            os._exit(0)
    gone = [os.fstat(s.fileno()).st_rdev == os.stat("/dev/null").st_rdev for s in (*opened, *listening, accepted)]
    kept = socket.socket(fileno=os.dup(unregistered.fileno()))
    kept.settimeout(None)
    kept.sendall((json.dumps([os.getpid(), os.getppid(), gone]) + "\\n").encode())
    while data := kept.recv(100):
        kept.sendall(data)
    signal.pause()

if kind == "multiprocessing":
    process = multiprocessing.get_context("fork").Process(target=child, args=(0,))
    process.start()
else:
    if os.fork() == 0:
        child(kind == "grandchild")
echoing = [threading.Thread(target=lambda s=s: [s.sendall(d) for d in iter(lambda: s.recv(100), b"")])
           for s in (*opened, accepted)]
for thread in echoing:
    thread.start()
signal.pause()
"""


@dataclass
class _Family:
    parent: subprocess.Popen[str]
    child: int
    gone: list[bool]
    connections: list[socket.socket]
    """Whose other ends are registered."""
    free: socket.socket
    """Its other end is not; the child echoes."""
    ports: list[int]
    """Where the parent listens."""


@contextmanager
def _family(kind: str) -> Iterator[_Family]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        for server in servers:
            server.settimeout(60)
        parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, kind, *(str(s.getsockname()[1]) for s in servers)],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(parent.wait, timeout=60)
        stack.callback(parent.kill)
        connections = [stack.enter_context(server.accept()[0]) for server in servers]
        assert parent.stdout is not None
        stack.enter_context(parent.stdout)
        ports = json.loads(parent.stdout.readline())
        connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", ports[0]))))
        free = connections.pop(2)
        for connection in (*connections, free):
            connection.settimeout(60)
        pid, parent_pid, gone = json.loads(free.makefile().readline())
        stack.callback(_kill, pid)
        if kind == "grandchild":
            stack.callback(_kill, parent_pid)
        yield _Family(parent, pid, gone, connections, free, ports)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _echo(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    assert connection.recv(100) == data


@pytest.mark.parametrize("kind", ["fork", "multiprocessing", "grandchild"])
def test_the_death_of_a_parent_is_seen_while_its_child_lives(kind: str) -> None:
    with _family(kind) as family:
        assert family.gone == [True] * 5  # two opened, two listening, one accepted
        for connection in family.connections:
            _echo(connection, b"the parent's own ends go on working")
        _echo(family.free, b"the child has what was not registered, or was forgotten")
        begun = time.monotonic()
        family.parent.kill()
        for connection in family.connections:
            try:
                assert connection.recv(1) == b""
            except ConnectionResetError:
                pass
        assert time.monotonic() - begun < 30
        for port in family.ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=30).close()
        os.kill(family.child, 0)
        _echo(family.free, b"the child lives on")


def _in_child(look: list[socket.socket]) -> list[bool]:
    """Whether each of them is closed in a forked child of this process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.stat(os.devnull).st_rdev
            os.write(writing, bytes(os.fstat(s.fileno()).st_rdev == null for s in look))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        os.waitpid(pid, 0)
        return [bool(b) for b in os.read(reading, 100)]
    finally:
        os.close(reading)


@pytest.fixture
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tests of other modules have left."""
    monkeypatch.setattr(fork, "_registered", ())


def test_addresses_fit_in_every_notation(nothing_registered: None) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(server.getsockname()))
        accepted = stack.enter_context(server.accept()[0])
        port = server.getsockname()[1]
        for own in (port, f"127.0.0.1:{port}", ("", port), ("0.0.0.0", port), ("::", port), ("::ffff:127.0.0.1", port)):
            registration = close_in_children(own=[own])
            assert _in_child([server, client, accepted]) == [True, False, True]
            registration.forget()
        for other in (f"http://localhost:{port}", ("localhost", port), ("127.0.0.1", port)):
            registration = close_in_children(others=[other])
            assert _in_child([server, client, accepted]) == [False, True, False]
            registration.forget()
        registration = close_in_children(own=[("127.0.0.2", port)], others=[("127.0.0.2", port), port + 1])
        assert _in_child([server, client, accepted]) == [False] * 3
        registration.forget()
        registration.forget()
        assert fork._registered == ()


def test_an_ipv6_socket_with_an_ipv4_peer_fits_its_plain_address() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no dual-stack sockets")
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True))
        port = server.getsockname()[1]
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        accepted = stack.enter_context(server.accept()[0])
        registration = close_in_children(own=[("127.0.0.1", port)])
        assert _in_child([server, client, accepted]) == [False, False, True]
        registration.add(own=[port])
        assert _in_child([server, client, accepted]) == [True, False, True]
        registration.forget()


def test_other_files_and_unix_sockets_are_left_alone() -> None:
    with ExitStack() as stack:
        pair = [stack.enter_context(s) for s in socket.socketpair()]
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        registration = close_in_children(own=[1], others=[("127.0.0.1", 1)])
        assert _in_child([*pair, udp]) == [False] * 3
        registration.forget()


def test_a_held_socket_that_was_closed_takes_no_other_one_with_it() -> None:
    first = socket.create_server(("127.0.0.1", 0))
    registration = close_in_children_fd(first)
    assert _in_child([first]) == [True]
    first.close()
    with socket.create_server(("127.0.0.1", 0)) as second:  # of the same number, most likely
        assert _in_child([second]) == [False]
    del first
    assert _in_child([]) == []
    registration.forget()


def test_a_name_that_does_not_resolve_is_left_out_and_nonsense_is_refused() -> None:
    registration = close_in_children(others=["nobody.invalid:80"])
    assert not registration.endpoints
    registration.forget()
    with pytest.raises(ValueError, match="not an address"):
        close_in_children(others=["nobody"])
    assert not Endpoints((), ())


def test_a_child_starts_with_nothing_registered(nothing_registered: None) -> None:
    registration = close_in_children(own=[1])
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(len(fork._registered)).encode())
            close_in_children(own=[2]).forget()  # its lock is free
            registration.forget()
            os.write(writing, b" fine")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answers:
        assert answers.read() == "0 fine"
    assert fork._registered == (registration,)
    registration.forget()


def test_a_thousand_other_sockets_do_not_hold_up_a_child() -> None:
    with ExitStack() as stack:
        for _ in range(700):
            for s in socket.socketpair():
                stack.enter_context(s)
        with socket.create_server(("127.0.0.1", 0)) as server:
            registration = close_in_children(own=[server.getsockname()[1]])
            begun = time.monotonic()
            assert _in_child([server]) == [True]
            assert time.monotonic() - begun < 30
            registration.forget()
