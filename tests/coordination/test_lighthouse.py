"""The lighthouse over real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from torchft.coordination import LighthouseClient, LighthouseServer, Quorum
from torchft.coordination.channel import open_channel
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.testing.ports import ReservedPort
from torchft.testing.wait import wait_until

Start = Callable[..., LighthouseServer]
CONNECT = timedelta(minutes=1)
WAIT = timedelta(minutes=1)


@pytest.fixture
def start() -> Iterator[Callable[..., LighthouseServer]]:
    servers: list[LighthouseServer] = []

    def make(**kwargs: int) -> LighthouseServer:
        server = LighthouseServer("127.0.0.1:0", **{"min_replicas": 1, **kwargs})
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()


def ask(server: LighthouseServer, pool: ThreadPoolExecutor, replica_id: str, **kwargs: object) -> Future[Quorum]:
    client = LighthouseClient(server.address(), CONNECT)
    return pool.submit(lambda: client.quorum(replica_id, WAIT, **kwargs))  # type: ignore[arg-type]


def test_a_quorum_tells_all_members_everything_each_member_said(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(min_replicas=2)
    a = ask(server, pool, "a", address="http://a:1", store_address="a:2", step=3, world_size=4, data={"k": [1, "x"]})
    b = ask(server, pool, "b", step=5, shrink_only=False)
    quorum = a.result(60)
    assert quorum == b.result(60)
    assert [m.replica_id for m in quorum.participants] == ["a", "b"]
    member = quorum.participants[0]
    assert (member.address, member.store_address, member.step, member.world_size) == ("http://a:1", "a:2", 3, 4)
    assert member.data == {"k": [1, "x"]}
    assert quorum.participants[1].data is None
    assert abs((datetime.now(UTC) - quorum.created).total_seconds()) < 60


def test_a_deadline_is_a_timeout_error_that_names_the_lighthouse(start: Start) -> None:
    server = start(min_replicas=2)
    client = LighthouseClient(server.address(), CONNECT)
    with pytest.raises(TimeoutError, match=server.address()):
        client.quorum("a", timedelta(milliseconds=100))


def test_a_caller_that_gave_up_is_no_member(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(min_replicas=1, heartbeat_timeout_ms=2000, join_timeout_ms=120_000)
    client = LighthouseClient(server.address(), CONNECT)
    client.heartbeat("b")  # so that a waits for b
    with pytest.raises(TimeoutError):
        client.quorum("a", timedelta(milliseconds=50))
    answer = ask(server, pool, "b")
    while not answer.done():  # b lives, a is silent
        client.heartbeat("b")
    quorum = answer.result()
    assert [m.replica_id for m in quorum.participants] == ["b"]


def test_asking_again_ends_the_first_call(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(min_replicas=2)
    first = ask(server, pool, "a", step=1)
    wait_until(server._service._core.membership.waiting)
    second = ask(server, pool, "a", step=2)
    with pytest.raises(RuntimeError, match="asked again"):
        first.result(60)
    other = ask(server, pool, "b")
    assert second.result(60).participants[0].step == 2
    assert other.result(60).quorum_id == second.result(60).quorum_id


def test_data_that_is_not_json_is_refused(start: Start) -> None:
    client = LighthouseClient(start().address(), CONNECT)
    with pytest.raises(ValueError, match="JSON"):
        client.quorum("a", WAIT, data={"x": object()})


@pytest.mark.parametrize("member", [pb.QuorumMember(), pb.QuorumMember(replica_id="x" * 100_000)])
def test_a_member_that_cannot_be_one_is_refused(start: Start, member: pb.QuorumMember) -> None:
    with open_channel(start().address()) as channel:
        stub = pb_grpc.LighthouseServiceStub(channel)
        with pytest.raises(grpc.RpcError) as e:
            stub.Quorum(pb.LighthouseQuorumRequest(requester=member), timeout=60, wait_for_ready=True)
        assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "replica_id" in e.value.details()


def test_garbage_instead_of_a_request_leaves_the_server_working(start: Start) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as s:
        s.sendall(os.urandom(4096))
    with open_channel(server.address()) as channel:
        call = channel.unary_unary("/torchft.LighthouseService/Quorum")
        with pytest.raises(grpc.RpcError):
            call(b"\xff" * 1000, timeout=60, wait_for_ready=True)
    assert LighthouseClient(server.address(), CONNECT).quorum("a", WAIT).participants[0].replica_id == "a"


def test_subscribers_hear_of_silence_and_of_injected_failures(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(heartbeat_timeout_ms=200)
    client = LighthouseClient(server.address(), CONNECT)
    notices = client.subscribe_failures(timeout=timedelta(minutes=2))
    first = pool.submit(lambda: next(notices))
    wait_until(lambda: server._service._subscribers)
    client.heartbeat("quiet")
    notice = first.result(60)
    assert notice.replica_id == "quiet"
    assert "heartbeat" in notice.error_message

    client.heartbeat("injected")
    second = pool.submit(lambda: next(notices))
    server.inject_failure("injected")
    assert second.result(60).replica_id == "injected"


def test_a_subscription_ends_with_a_timeout_error(start: Start) -> None:
    client = LighthouseClient(start().address(), CONNECT)
    with pytest.raises(TimeoutError):
        next(client.subscribe_failures(timeout=timedelta(milliseconds=100)))


def test_shutdown_fails_those_that_wait(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(min_replicas=2)
    waiting = ask(server, pool, "a")
    wait_until(server._service._core.membership.waiting)
    server.shutdown()
    with pytest.raises((RuntimeError, TimeoutError), match=server.address()):
        waiting.result(60)


def test_a_lighthouse_that_is_not_there_is_a_clear_error() -> None:
    with (
        ReservedPort() as nobody,
        pytest.raises(TimeoutError, match=rf"http://127.0.0.1:{nobody.port}.*[Rr]efused.*TORCHFT_LIGHTHOUSE"),
    ):
        LighthouseClient(f"http://127.0.0.1:{nobody.port}", timedelta(milliseconds=300))


def test_a_lighthouse_that_keeps_one_waiting_is_named_in_the_log_with_the_cause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torchft.coordination.channel._SAY_AFTER", 0.1)
    with ReservedPort() as nobody, pytest.raises(TimeoutError):
        LighthouseClient(f"http://127.0.0.1:{nobody.port}", timedelta(seconds=2))
    said = [r.getMessage() for r in caplog.records if "does not answer yet" in r.getMessage()]
    assert len(said) == 1
    assert f"127.0.0.1:{nobody.port}" in said[0]


def test_a_lighthouse_that_comes_late_is_waited_for() -> None:
    started: list[LighthouseServer] = []
    with ReservedPort() as kept:
        timer = threading.Timer(0.3, lambda: started.append(LighthouseServer(f"127.0.0.1:{kept.port}", 1)))
        timer.start()
        try:
            LighthouseClient(f"http://127.0.0.1:{kept.port}", CONNECT).heartbeat("a")
        finally:
            timer.join()
            started[0].shutdown()


def test_a_taken_port_is_a_clear_error(start: Start) -> None:
    with pytest.raises(RuntimeError, match="port is in use"):
        LighthouseServer(f"127.0.0.1:{start().port}", 1)


@pytest.mark.parametrize(
    "command",
    [
        [
            "-m",
            "torchft.cli.lighthouse",
            "--min_replicas",
            "1",
            "--join_timeout_ms",
            "100",
            "--quorum_tick_ms",
            "50",
        ],
        ["-m", "torchft.cli.main", "lighthouse", "--min-replicas", "1", "--heartbeat-timeout-ms", "5000"],
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal_ends_it_cleanly(command: list[str], number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, *command, "--bind", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stderr is not None
        address = next(w for line in process.stderr for w in line.split() if w.startswith("http://")).rstrip(",)")
        assert LighthouseClient(address, CONNECT).quorum("a", WAIT).quorum_id == 1
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
