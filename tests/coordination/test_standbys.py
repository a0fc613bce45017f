"""Several lighthouses that elect their leader in a real etcd, and clients that find it."""

from __future__ import annotations

import logging
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.coordination.standbys import MINUTE, Lights, ask, call, member
from tests.coordination.test_sessions import Member
from tests.etcd import Etcd, needs_etcd, running_etcd, standby
from tests.lighthouse import LighthouseProcess
from torchft.coordination import LighthouseClient, LighthouseServer
from torchft.coordination.channel import open_channel
from torchft.coordination.election import RegisterError
from torchft.coordination.etcd import EtcdRegister
from torchft.coordination.lighthouses import LEADER_KEY
from torchft.coordination.proto import session_pb2, session_pb2_grpc
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.core.election import LeaseOptions, first_id
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until

# --------------------------------------------------------------------------------------------------- who leads


@needs_etcd
def test_one_leads_and_the_others_send_everybody_to_it(shared: Etcd, lights: Lights) -> None:
    for _ in range(3):
        lights.start(shared.url("send"))
    leader = lights.leader()
    assert leader.epoch == 1
    standby = lights.others()[0]
    wait_until(lambda: standby._seat.leader, what="that the standby knows the leader")
    with pytest.raises(grpc.RpcError, match=f"does not lead: {leader.address()} does") as e:
        call(standby)
    assert e.value.code() == grpc.StatusCode.UNAVAILABLE
    assert (LEADER_KEY, leader.address()) in [(k, v) for k, v in e.value.trailing_metadata()]
    with open_channel(standby.address()) as channel:
        hello = session_pb2.SessionUp(hello=session_pb2.Hello(replica_id="a"))
        answers = list(
            session_pb2_grpc.SessionServiceStub(channel).Session(iter([hello]), timeout=60, wait_for_ready=True)
        )
    assert [a.redirect.leader for a in answers] == [leader.address()]

    # Clients that know only the standby get there by it.
    client = LighthouseClient(standby.address(), MINUTE)
    quorum = client.quorum("a", MINUTE)
    assert quorum.quorum_id == first_id(1) + 1
    client.heartbeat("a")
    assert client.report_failure("a", "test")
    client.close()
    with member(standby.address()) as m:
        assert ask(m) == 1


@needs_etcd
def test_a_leader_that_ends_hands_over_at_once(shared: Etcd, lights: Lights, pool: ThreadPoolExecutor) -> None:
    for _ in range(3):
        lights.start(shared.url("over"), lease_ms=300_000, min_replicas=2)
    with member(lights.addresses(), "a") as a, member(lights.addresses(), "b") as b:
        for epoch in (1, 2, 3):
            waiting = pool.submit(ask, a)
            leader = lights.leader()
            wait_until(leader._service._core.waiting)
            if epoch < 3:
                lights.end(leader)  # while somebody waits
                wait_until(lambda: lights.leader()._service._core.waiting(), what="that a asks the next one")
                assert lights.leader().epoch == epoch + 1
            other = pool.submit(ask, b)
            assert waiting.result(60) == other.result(60) == min(epoch + 1, 3)


@needs_etcd
def test_jobs_are_apart(shared: Etcd, lights: Lights) -> None:
    one, two = lights.start(shared.url("one")), lights.start(shared.url("two"))
    wait_until(lambda: one.epoch and two.epoch)
    assert (call(one).epoch, call(two).epoch) == (1, 1)


@needs_etcd
def test_a_subscription_goes_on_at_the_next_leader(shared: Etcd, lights: Lights, pool: ThreadPoolExecutor) -> None:
    for _ in range(2):
        lights.start(shared.url("subscription"), lease_ms=300_000)
    client = LighthouseClient(lights.addresses(), MINUTE)
    notices = client.subscribe_failures(timeout=MINUTE)
    heard: Future[Any] = pool.submit(next, notices)
    wait_until(lambda: lights.leader()._service._subscribers)
    lights.end(lights.leader())
    wait_until(lambda: lights.leader()._service._subscribers)
    client.heartbeat("x")
    lights.leader().inject_failure("x")
    assert heard.result(60).replica_id == "x"
    client.close()


# ------------------------------------------------------------------------------------------------ etcd is away


@needs_etcd
def test_a_leader_without_etcd_goes_on_until_its_lease_ends(
    tmp_path: Path, lights: Lights, caplog: pytest.LogCaptureFixture
) -> None:
    """etcd is stopped, killed, and started again: with its data the epochs go on, without them as well."""
    caplog.set_level(logging.INFO, "torchft")
    with running_etcd(tmp_path) as etcd:
        server = lights.start(etcd.url("away"), lease_ms=3000)
        lights.leader()
        with member(server.address()) as m:
            assert ask(m) == 1
            client = LighthouseClient(server.address(), MINUTE)
            etcd.process.send_signal(signal.SIGSTOP)
            client.heartbeat("x")  # it still answers
            client.close()
            wait_until(lambda: not server.epoch, what="that it steps down")
            wait_until(lambda: "may have run out: the register was not reached" in caplog.text)
            with pytest.raises(grpc.RpcError, match="knows nobody that does right now"):
                call(server)
            waiting: list[int] = []
            asking = threading.Thread(target=lambda: waiting.append(ask(m)))
            asking.start()
            etcd.kill()
            etcd.start_again()
            asking.join(60)
            assert waiting == [2]

            etcd.kill()
            etcd.start_again(with_data=False)
            wait_until(lambda: server.epoch != 2, what="that it finds its lease gone")
            assert ask(m) > 2, "the member has seen 2"


@needs_etcd
def test_a_leader_that_is_cut_off_from_etcd_is_replaced_and_joins_again(shared: Etcd, lights: Lights) -> None:
    with Link(f"127.0.0.1:{shared.port}") as link:
        first = lights.start(shared.url("cut", int(link.address.rpartition(":")[2])), lease_ms=1000)
        lights.leader()
        second = lights.start(shared.url("cut"), lease_ms=1000)
        with member(lights.addresses()) as m:
            assert ask(m) == 1
            link.block()
            wait_until(lambda: second.epoch == 2, what="that the second one leads")
            assert first.epoch == 0, "the first one has stepped down before"
            assert ask(m) == 2
            link.restore()
            wait_until(lambda: first._seat.leader == second.address(), what="that the first one stands by")
            lights.end(second)
            assert ask(m) == 3


@needs_etcd
def test_what_others_wrote_into_etcd_is_no_leader(
    shared: Etcd, lights: Lights, caplog: pytest.LogCaptureFixture
) -> None:
    shared.put("/torchft/garbage/leader", "me!")
    server = lights.start(shared.url("garbage"), lease_ms=1000)
    wait_until(lambda: "did not answer as it should" in caplog.text)
    assert server.epoch == 0
    shared.put("/torchft/garbage/leader", '{"name": 1, "address": 2, "life_address": 3}')
    register = EtcdRegister(shared.url("garbage"), LeaseOptions(1.0))
    with pytest.raises(RegisterError, match="no lighthouse"):
        register.look()
    register.close()


# ------------------------------------------------------------------------------------------- the last quorum


@pytest.mark.parametrize("ha", [False, pytest.param(True, marks=needs_etcd)])
def test_nobody_takes_the_place_of_groups_that_may_still_train_until_they_are_known_to_be_dead(
    ha: bool, tmp_path: Path, request: pytest.FixtureRequest, pool: ThreadPoolExecutor
) -> None:
    """Two groups in a quorum are cut off, their lighthouse is started again, and a third one comes."""
    right = {"ha": request.getfixturevalue("shared").url("last")} if ha else {"state_file": tmp_path / "state"}

    def start(min_replicas: int, port: int = 0) -> LighthouseServer:
        server = LighthouseServer(f"127.0.0.1:{port}", min_replicas, 5000, heartbeat_timeout_ms=1000, **right)  # type: ignore[arg-type]
        wait_until(lambda: server.epoch)
        return server

    server = start(2)
    members = [Member(name, server.address()) for name in ("a", "b")]
    try:
        for m in members:
            m.wait("ready")
        for m in members:
            m.tell("ask")
        for m in members:
            assert m.wait("quorum")["members"] == ["a", "b"]
        for m in members:
            m.signal(signal.SIGSTOP)
        server.shutdown()
        server = start(1, server.port)
        with member(server.address(), "c") as c:
            asked = pool.submit(ask, c)
            wait_until(server._service._core.waiting)
            with pytest.raises(TimeoutError):
                asked.result(3)  # three heartbeat timeouts
            for m in members:
                m.signal(signal.SIGKILL)
            assert asked.result(60) == 2
    finally:
        for m in members:
            m.end()
        server.shutdown()


# ----------------------------------------------------------------------------------------------- real processes


@needs_etcd
def test_killed_and_stopped_leaders_are_replaced_and_fenced_when_they_wake(
    shared: Etcd, lights: Lights, pool: ThreadPoolExecutor
) -> None:
    """SIGKILL is seen by the kernel's refusal, SIGSTOP by the lease. The one that wakes answers nobody."""
    lease_ms = 2000
    killed = standby(shared.url("signals"), 300_000)
    stopped: LighthouseProcess | None = None
    try:
        wait_until(lambda: killed.epochs() == [1])
        stopped = standby(shared.url("signals"), lease_ms)
        wait_until(lambda: stopped.said("standby: "), what="that it stands by")
        with member(f"{killed.address},{stopped.address}") as m:
            assert ask(m) == 1
            killed.process.kill()
            assert ask(m) == 2, "although its lease has minutes to go"
            wait_until(lambda: stopped.epochs() == [2], what="that it says so")

            third = lights.start(shared.url("signals"), lease_ms=lease_ms)
            stopped.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: third.epoch == 3, what="that the third one leads")
            # m knows only the two, one dead and one asleep; b knows where the third is.
            with member(f"{stopped.address},{third.address()}", "b") as b:
                assert ask(b) == 3
                with open_channel(stopped.address) as channel:
                    request = pb.LighthouseQuorumRequest(requester=pb.QuorumMember(replica_id="bare"))
                    stub = pb_grpc.LighthouseServiceStub(channel)
                    answer = pool.submit(lambda: stub.Quorum(request, timeout=60, wait_for_ready=True))
                    stopped.process.send_signal(signal.SIGCONT)
                    with pytest.raises(grpc.RpcError, match="does not lead"):
                        answer.result(60)
                wait_until(lambda: stopped.said("no longer leads (epoch 2)"))
                assert ask(b) == 3
            assert ask(m) == 3, "it is sent there by the one that woke"
    finally:
        killed.end()
        if stopped is not None:
            stopped.end()
