"""A parameter server's sessions are each other's no business, and its clients may be anybody."""

from __future__ import annotations

import errno
import http.server
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from torchft.parameter_server import ParameterServer, ParameterServerError
from torchft.process_group import ProcessGroup, ProcessGroupBabyGloo, ProcessGroupGloo
from torchft.runtime.deadline import Deadline
from torchft.runtime.nursery import Nursery
from torchft.testing.wait import wait_until

TIMEOUT = timedelta(seconds=60)


class Adder(ParameterServer):
    """Keeps a number. A client sends what to add, and gets the sum; a negative number ends the session."""

    total = 0.0
    lock = threading.Lock()

    @classmethod
    def new_process_group(cls) -> ProcessGroup:
        return ProcessGroupGloo(timeout=TIMEOUT)

    def forward(self, session_id: str, pg: ProcessGroup) -> None:
        value = torch.zeros(1)
        while True:
            pg.broadcast_one(value, 1).wait()
            if value.item() < 0:
                return
            with self.lock:
                self.total += value.item()
                answer = torch.tensor([self.total])
            pg.broadcast_one(answer, 0).wait()


def add(pg: ProcessGroup, value: float) -> float:
    answer = torch.zeros(1)
    pg.broadcast_one(torch.tensor([float(value)]), 1).wait()
    pg.broadcast_one(answer, 0).wait()
    return answer.item()


@pytest.fixture
def serve() -> Iterator[Callable[..., Adder]]:
    servers: list[Adder] = []

    def make(**options: Any) -> Adder:
        servers.append(Adder(hostname="127.0.0.1", **options))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()


def test_clients_come_and_go_and_share_what_the_server_keeps(serve: Callable[..., Adder]) -> None:
    server = serve()
    one, two = (Adder.new_session(server.address()) for _ in range(2))
    assert (one.rank(), one.size()) == (1, 2)
    assert len(server.sessions()) == 2
    assert [add(one, 1), add(two, 2), add(one, 3)] == [1.0, 3.0, 6.0]
    one.broadcast_one(torch.tensor([-1.0]), 1).wait()
    wait_until(lambda: len(server.sessions()) == 1, 30, "the end of the session")
    three = Adder.new_session(server.address())
    assert [add(three, 4), add(two, 5)] == [10.0, 15.0]
    for pg in (one, two, three):
        pg.shutdown()
    wait_until(lambda: not server.sessions(), 30, "the end of all sessions")
    wait_until(lambda: not any("session" in key for key in server._store.list_keys()), 30, "the end of their keys")


def client(arguments: dict[str, Any], files: list[int]) -> None:
    """Runs in a process of its own: adds one, says so, and waits for whatever happens to it."""
    pg = Adder.new_session(arguments["address"])
    os.write(files[0], str(add(pg, 1)).encode())
    signal.pause()


def test_a_client_that_is_killed_costs_its_session_and_nobody_else(serve: Callable[..., Adder]) -> None:
    server = serve()
    survivor = Adder.new_session(server.address())
    assert add(survivor, 1) == 1.0
    nursery = Nursery(["tests.test_parameter_server"], "nursery of clients")
    read, write = os.pipe()
    try:
        arguments = {"address": server.address()}
        child = nursery.spawn("tests.test_parameter_server:client", arguments, [write], Deadline(60))
        assert os.read(read, 100) == b"2.0"
        assert len(server.sessions()) == 2
        child.signal(signal.SIGKILL)
        wait_until(lambda: len(server.sessions()) == 1, 30, "the end of the killed client's session")  # timeout: 60
        assert add(survivor, 1) == 3.0
    finally:
        nursery.close()
        os.close(read)
        os.close(write)
    survivor.shutdown()


class Careful(Adder):
    """Its groups are in children: gloo ends the process in which a message has not the size that is expected."""

    @classmethod
    def new_process_group(cls) -> ProcessGroup:
        return ProcessGroupBabyGloo(timeout=TIMEOUT)


def test_with_baby_groups_a_client_of_another_opinion_costs_its_session_and_nobody_else() -> None:
    server = Careful(hostname="127.0.0.1")
    try:
        survivor, confused = (Adder.new_session(server.address()) for _ in range(2))
        assert [add(survivor, 1), add(confused, 1)] == [1.0, 2.0]
        confused.broadcast_one(torch.zeros(3, dtype=torch.int64), 1).wait()
        wait_until(lambda: len(server.sessions()) == 1, 30, "the end of the confused client's session")
        assert add(survivor, 1) == 3.0
        for pg in (survivor, confused):
            pg.shutdown()
    finally:
        server.shutdown()


def test_a_client_that_asks_and_does_not_come_costs_a_session_until_the_timeout(
    serve: Callable[..., Adder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short() -> ProcessGroup:
        return ProcessGroupGloo(timeout=timedelta(seconds=2))

    server = serve(max_sessions=1)
    monkeypatch.setattr(Adder, "new_process_group", staticmethod(short))
    assert server._open("127.0.0.1") is not None
    with pytest.raises(ParameterServerError, match=r"no room for another session, it has 1.*\(503\)"):
        Adder.new_session(server.address())
    wait_until(lambda: not server.sessions(), 30, "the end of the session")
    monkeypatch.undo()
    pg = Adder.new_session(server.address())
    assert add(pg, 1) == 1.0
    pg.shutdown()


def test_without_the_token_there_is_no_session(serve: Callable[..., Adder]) -> None:
    server = serve(token="secret")
    for wrong in (None, "guess"):
        with pytest.raises(ParameterServerError, match=r"asks for a token.*\(401\)"):
            Adder.new_session(server.address(), token=wrong)
    assert server.sessions() == []
    pg = Adder.new_session(server.address(), token="secret")
    assert add(pg, 1) == 1.0
    pg.shutdown()


def test_shutdown_ends_sessions_under_way_and_those_that_wait_for_their_client(serve: Callable[..., Adder]) -> None:
    server = serve()
    pg = Adder.new_session(server.address())
    assert add(pg, 1) == 1.0
    server._open("127.0.0.1")
    threads = [session.thread for session in server._sessions.values()]
    begun = time.monotonic()
    server.shutdown()
    server.shutdown()
    assert time.monotonic() - begun < 30  # the groups' timeout is 60
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(RuntimeError):
        add(pg, 1)
    with pytest.raises(ParameterServerError, match="cannot be reached"):
        Adder.new_session(server.address())
    pg.shutdown()


@pytest.mark.parametrize("nonsense", [b"", b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"POST " + b"x" * 100_000])
def test_nonsense_is_answered_or_hung_up_on_and_hurts_nobody(serve: Callable[..., Adder], nonsense: bytes) -> None:
    server = serve()
    with socket.create_connection(("127.0.0.1", server._server.server_port), timeout=30) as connection:
        try:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except OSError as e:  # hung up on, maybe before this end has shut down its own
            if not (isinstance(e, ConnectionError) or e.errno == errno.ENOTCONN):
                raise
    assert server.sessions() == []
    pg = Adder.new_session(server.address())
    assert add(pg, 1) == 1.0
    pg.shutdown()


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b'{"session_id": 1, "store_address": "x"}', b'{"session_id": "%s"}' % (b"0" * 32)]
)
def test_what_is_no_parameter_server_is_recognised(answer: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(ParameterServerError, match="is no parameter server"):
            Adder.new_session(f"http://127.0.0.1:{other.server_port}/new_session")
        thread.join(30)
    with pytest.raises(ParameterServerError, match="is not the address"):
        Adder.new_session("ftp://127.0.0.1/new_session")
