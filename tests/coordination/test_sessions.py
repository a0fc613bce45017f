"""Sessions between real processes: which ends of a session are deaths, and who is told."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.forked import ForkedProgram
from torchft.coordination import LighthouseClient, LighthouseServer, ManagerClient, ManagerServer
from torchft.coordination.channel import open_channel
from torchft.coordination.proto import session_pb2 as pb
from torchft.coordination.proto.torchft_pb2 import QuorumMember
from torchft.coordination.session_client import OneServer, SessionClient, SessionEvents
from torchft.coordination.types import ANY_QUORUM, Notice
from torchft.runtime.deadline import Deadline
from torchft.runtime.life import life_address
from torchft.runtime.logs import RankLogger
from torchft.testing.wait import wait_until

MINUTE = timedelta(minutes=1)
MEMBER = Path(__file__).with_name("member.py")


class Member:
    """A child process with a ManagerServer."""

    def __init__(
        self,
        replica_id: str,
        lighthouse: str,
        program: type[ForkedProgram] | type[subprocess.Popen[str]] = ForkedProgram,
    ) -> None:
        self.replica_id = replica_id
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.process = program(
            [sys.executable, str(MEMBER), replica_id, lighthouse],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()

    def wait(self, event: str, where: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The first such event, waiting for it."""
        deadline = Deadline(60)
        with self._changed:
            while True:
                for e in self.events:
                    if e["event"] == event and where(e):
                        return e
                assert not deadline.expired, f"{self.replica_id} said no {event}: {self.events}"
                self._changed.wait(deadline.remaining())

    def notices(self, replica_id: str) -> list[dict[str, Any]]:
        return [e for e in list(self.events) if e["event"] == "notice" and e["replica"] == replica_id]

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> float:
        """Sends it. Returns when, on the clock of the events."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Job:
    """A lighthouse and members that are all in one quorum."""

    def __init__(self, heartbeat_timeout_ms: int, min_replicas: int = 2) -> None:
        self.lighthouse = LighthouseServer(
            "127.0.0.1:0", min_replicas, join_timeout_ms=180_000, heartbeat_timeout_ms=heartbeat_timeout_ms
        )
        self.members: list[Member] = []

    def start(self, *names: str, **options: Any) -> list[Member]:
        started = [Member(name, self.lighthouse.address(), **options) for name in names]
        self.members += started
        for member in started:
            member.wait("ready")
        for member in started:
            member.tell("ask")
        for member in started:
            member.wait("quorum")
        return started

    def close(self) -> None:
        for member in self.members:
            member.end()
        self.lighthouse.shutdown()


@pytest.fixture
def make() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def job(heartbeat_timeout_ms: int = 5000) -> Job:
        jobs.append(Job(heartbeat_timeout_ms))
        return jobs[-1]

    yield job
    for j in jobs:
        j.close()


def test_a_killed_process_is_known_to_be_dead_long_before_the_heartbeat_timeout(make: Callable[..., Job]) -> None:
    job = make(heartbeat_timeout_ms=180_000)
    a, b = job.start("a", "b")
    failures = LighthouseClient(job.lighthouse.address(), MINUTE).subscribe_failures(timeout=MINUTE)
    wait_until(lambda: len(job.lighthouse._service._subscribers) == 1, timeout=60)
    b.signal(signal.SIGKILL)
    notice = a.wait("notice", lambda e: e["replica"] == "b")
    assert "process has ended" in notice["cause"]
    assert notice["quorum"] == a.wait("quorum")["id"]
    assert next(failures).replica_id == "b"
    # Nobody waits for the dead: c and a go on, though the heartbeat timeout and the join timeout are three minutes.
    assert _joined(job, "c", a)["members"] == ["a", "c"]


def _joined(job: Job, name: str, other: Member) -> dict[str, Any]:
    member = Member(name, job.lighthouse.address())
    job.members.append(member)
    member.wait("ready")
    member.tell("ask")
    other.tell("ask")
    return member.wait("quorum")


def test_a_forked_child_does_not_hide_the_death_of_its_parent(make: Callable[..., Job]) -> None:
    job = make(heartbeat_timeout_ms=180_000)
    a, b = job.start("a", "b")
    b.tell("fork")
    child = b.wait("child")["pid"]
    try:
        b.wait("done", lambda e: e["command"] == "fork")
        b.signal(signal.SIGKILL)
        assert "process has ended" in a.wait("notice", lambda e: e["replica"] == "b")["cause"]
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_stopped_process_is_dead_after_the_heartbeat_timeout_and_comes_back_by_asking(
    make: Callable[..., Job],
) -> None:
    job = make(heartbeat_timeout_ms=2000)
    a, b = job.start("a", "b")
    stopped = b.signal(signal.SIGSTOP)
    notice = a.wait("notice", lambda e: e["replica"] == "b")
    assert notice["time"] - stopped > 1
    b.signal(signal.SIGCONT)
    before = len([e for e in b.events if e["event"] == "quorum"])
    b.tell("ask")
    a.tell("ask")
    b.wait("done", lambda e: len([q for q in b.events if q["event"] == "quorum"]) > before)
    newest = [e for e in b.events if e["event"] == "quorum"][-1]
    assert newest["members"] == ["a", "b"]
    assert newest["id"] > notice["quorum"]


def test_a_process_that_holds_its_gil_is_not_dead(make: Callable[..., Job]) -> None:
    job = make(heartbeat_timeout_ms=2000)
    a, b = job.start("a", "b")
    rank1 = Session(b.wait("ready")["address"], "b", 1, pings=(0.5, 3.0))
    b.tell("hold_gil 6")
    b.tell("leave the GIL is back")
    left = a.wait("notice", lambda e: e["replica"] == "b")
    assert left["cause"] == "it left: the GIL is back"
    assert not rank1.lost, "its rank 0 was there: C threads of gRPC's have answered the pings"
    rank1.close()
    held = b.wait("done", lambda e: e["command"] == "hold_gil")["time"] - b.wait("quorum")["time"]
    assert held > 5.5
    assert len(a.notices("b")) == 1


def test_who_leaves_says_why_and_after_which_step(make: Callable[..., Job]) -> None:
    job = make()
    a, b = job.start("a", "b")
    b.tell("leave all data seen")
    notice = a.wait("notice")
    assert (notice["replica"], notice["cause"], notice["step"]) == ("b", "it left: all data seen", 3)
    b.signal(signal.SIGKILL)
    c = _joined(job, "c", a)
    assert c["members"] == ["a", "c"]
    assert len(a.notices("b")) == 1, "the end of a process that has left is no news"


def test_an_exception_that_nobody_caught_is_a_leave_with_its_cause(make: Callable[..., Job]) -> None:
    job = make()
    a, b = job.start("a", "b", program=subprocess.Popen)
    b.tell("raise")
    assert a.wait("notice")["cause"] == "it left: ZeroDivisionError: made on purpose"
    assert b.process.wait(timeout=60) == 1


def test_a_program_that_just_ends_leaves(make: Callable[..., Job]) -> None:
    job = make()
    a, b = job.start("a", "b", program=subprocess.Popen)
    assert b.process.stdin is not None
    b.process.stdin.close()
    assert "ended without manager.shutdown()" in a.wait("notice")["cause"]


def test_a_supervisor_reports_what_it_knows(make: Callable[..., Job]) -> None:
    job = make()
    a, _ = job.start("a", "b")
    client = LighthouseClient(job.lighthouse.address(), MINUTE)
    assert client.report_failure("b", "exit code 7")
    assert a.wait("notice")["cause"] == "exit code 7"
    assert not client.report_failure("b", "exit code 7"), "it is known to be dead"
    with pytest.raises(RuntimeError, match="names a replica"):
        client.report_failure("", "nobody")


def test_injected_failures_are_told_on_sessions_and_to_subscribers(make: Callable[..., Job]) -> None:
    job = make()
    a, b = job.start("a", "b")
    failures = LighthouseClient(job.lighthouse.address(), MINUTE).subscribe_failures(timeout=MINUTE)
    wait_until(lambda: len(job.lighthouse._service._subscribers) == 1, timeout=60)
    job.lighthouse.inject_failure("b")
    assert a.wait("notice")["cause"] == b.wait("notice")["cause"] == next(failures).error_message


# ------------------------------------------------------------------------------------------ inside one process


class Session:
    """A bare session, in this process."""

    def __init__(
        self, server: str, replica_id: str, rank: int = 0, pings: tuple[float, float] | None = None, **hello: Any
    ) -> None:
        self.name = replica_id
        self.notices: list[Notice] = []
        self.welcomes: list[pb.Welcome] = []
        self.gone: list[str] = []
        self.lost: list[None] = []
        self.client = ManagerClient(server, MINUTE, pings=pings)
        self.session = SessionClient(
            OneServer(self.client.channel),
            lambda: pb.Hello(replica_id=replica_id, group_rank=rank, **hello),
            SessionEvents(
                self.notices.append, self.welcomes.append, self.gone.append, lost=lambda: self.lost.append(None)
            ),
            server,
            RankLogger(logging.getLogger(__name__), replica_id, rank, lambda: 0),
        )
        wait_until(lambda: self.session.stands, timeout=60)

    def close(self) -> None:
        self.session.close()
        self.client.close()


def test_a_lost_connection_is_no_death_while_the_process_lives() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1, heartbeat_timeout_ms=5000)
    watcher = Session(lighthouse.address(), "watcher")
    member = Session(lighthouse.address(), "m", active=True, life_address=life_address())
    for _ in range(3):
        seen = len(member.welcomes)
        member.session._call.cancel()  # as good as a cut: the stream ends without a word
        wait_until(lambda s=seen: len(member.welcomes) > s, timeout=60)  # type: ignore[misc]
    assert not watcher.notices
    member.session.leave("now it does", 5, 60.0)
    wait_until(lambda: bool(watcher.notices), timeout=60)
    assert [(n.replica_id, n.step) for n in watcher.notices] == [("m", 5)]
    member.close()
    watcher.close()
    lighthouse.shutdown()


def test_a_second_session_of_the_same_member_replaces_the_first() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1, heartbeat_timeout_ms=1000)
    watcher = Session(lighthouse.address(), "watcher")
    first = Session(lighthouse.address(), "m", active=True)
    first.session._events = SessionEvents(first.notices.append)
    second = Session(lighthouse.address(), "m", active=True)
    first.close()
    probe = Session(lighthouse.address(), "p", active=True)
    probe.close()  # never comes back: dead after a second, which m would be, too, if the first session's end counted
    wait_until(lambda: bool(watcher.notices), timeout=60)
    assert [n.replica_id for n in watcher.notices] == ["p"]
    second.close()
    watcher.close()
    lighthouse.shutdown()


def _group(lighthouse: str, world_size: int) -> ManagerServer:
    return ManagerServer("g", lighthouse, "", "[::]:0", "store:1", world_size, timedelta(seconds=0.1), MINUTE, 0)


def test_a_rank_that_dies_ends_what_the_others_wait_for_and_names_itself() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1)
    watcher = Session(lighthouse.address(), "watcher")
    server = _group(lighthouse.address(), 3)
    heard: list[Notice] = []
    server.listen(heard.append)
    rank1 = Session(server.address(), "g", 1)
    rank2 = ForkedProgram(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv = sys.argv[1:]\n"
            "from tests.coordination.test_sessions import Session, life_address\n"
            "s = Session(sys.argv[0], 'g', 2, life_address=life_address()); print('stands', flush=True); input()",
            server.address(),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank2.stdout is not None
    assert rank2.stdout.readline() == "stands\n"
    with ThreadPoolExecutor(4) as pool:
        asked = pool.submit(lambda: server._quorum(0, 1, "", False, MINUTE, 0))
        asked1 = pool.submit(lambda: rank1.client._quorum(1, 1, "", False, MINUTE, 0))
        wait_until(lambda: len(server._quorum_round._gather.waiting) == 2, timeout=60)
        time_limit = Deadline(40)  # less than the timeouts
        rank2.kill()
        for future in (asked, asked1):
            with pytest.raises(RuntimeError, match="rank 2 of this group is no longer there"):
                future.result(time_limit.remaining())
        for call in (
            lambda: server.should_commit(0, 1, True, MINUTE),
            lambda: rank1.client.should_commit(1, 1, True, MINUTE),
            lambda: rank1.client._quorum(1, 1, "", False, MINUTE, 0),
        ):
            with pytest.raises(RuntimeError, match="rank 2"):
                pool.submit(call).result(time_limit.remaining())
    rank2.wait()
    for stream in (rank2.stdin, rank2.stdout):
        assert stream is not None
        stream.close()
    wait_until(lambda: bool(heard) and bool(rank1.notices), timeout=60)
    assert [(n.replica_id, n.quorum_id) for n in heard] == [("g", ANY_QUORUM)]
    assert not watcher.notices, "a group that never asked was nobody's hope"
    for closing in (rank1, watcher):
        closing.close()
    server.shutdown()
    lighthouse.shutdown()


def test_a_rank_that_leaves_ends_also_the_question_that_waits_at_the_lighthouse() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 2)
    watcher = Session(lighthouse.address(), "watcher")
    server = _group(lighthouse.address(), 2)
    heard: list[Notice] = []
    server.listen(heard.append)
    rank1 = Session(server.address(), "g", 1)
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(lambda: server._quorum(0, 1, "", False, MINUTE, 0))
        pool.submit(lambda: rank1.client._quorum(1, 1, "", False, MINUTE, 0))
        wait_until(lambda: "g" in lighthouse._service._answers, timeout=60)
        assert rank1.session.leave("its loss is not a number", 1, 60.0)
        with pytest.raises(RuntimeError, match="rank 1 of this group left: its loss is not a number"):
            asked.result(20)
        wait_until(lambda: bool(watcher.notices), timeout=20)
    assert "rank 1: its loss is not a number" in watcher.notices[0].cause
    wait_until(lambda: bool(heard), timeout=20)
    assert (heard[0].cause, heard[0].step) == ("rank 1 of this group left: its loss is not a number", 1)
    for closing in (rank1, watcher):
        closing.close()
    server.shutdown()
    lighthouse.shutdown()


def test_a_rank_0_that_leaves_says_so_to_its_ranks() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1)
    server = _group(lighthouse.address(), 2)
    rank1 = Session(server.address(), "g", 1)
    server.leave("it is done", 4)
    wait_until(lambda: bool(rank1.notices), timeout=60)
    left = rank1.notices[0]
    assert (left.replica_id, left.cause, left.quorum_id, left.step) == (
        "g",
        "rank 0 of this group left: it is done",
        ANY_QUORUM,
        4,
    )
    rank1.close()
    server.shutdown()
    lighthouse.shutdown()


def test_a_listener_that_raises_ends_no_session() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1)
    member, other = (Session(lighthouse.address(), name, active=True) for name in "mo")
    heard: list[Notice] = []

    def fail(notice: Notice) -> None:
        heard.append(notice)
        raise RuntimeError("the process group could not be aborted")

    member.session._events = SessionEvents(fail)
    for leaves in (other, Session(lighthouse.address(), "p", active=True)):
        assert leaves.session.leave("it is done", 5, 60.0)
        leaves.close()
    wait_until(lambda: [n.replica_id for n in heard] == ["o", "p"], timeout=60)
    member.close()
    lighthouse.shutdown()


def test_a_rank_learns_that_its_rank_0_has_died(make: Callable[..., Job]) -> None:
    job = make()
    (a,) = _alone(job)
    rank1 = Session(a.wait("ready")["address"], "a", 1)
    a.signal(signal.SIGKILL)
    wait_until(lambda: bool(rank1.gone), timeout=60)
    assert "has ended" in rank1.gone[0]
    rank1.close()


def _alone(job: Job) -> list[Member]:
    member = Member("a", job.lighthouse.address())
    job.members.append(member)
    member.wait("ready")
    return [member]


def test_a_quorum_that_cannot_be_is_not_taken_on() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1, heartbeat_timeout_ms=1000)
    announced = pb.Announcement(quorum_id=2**63 - 1, replica_rank=0, size=1, step=3, stands=True)
    garbled = Session(lighthouse.address(), "garbled", standing=True, announced=announced)
    client = LighthouseClient(lighthouse.address(), MINUTE)
    assert client.quorum("good", timedelta(seconds=20)).quorum_id == 1
    for closing in (garbled, client):
        closing.close()
    lighthouse.shutdown()


def test_a_step_beyond_all_numbers_keeps_nobody_from_the_change_of_the_members() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1)
    first = Session(lighthouse.address(), "a", standing=True)
    deadline = Deadline(40)

    def ask(session: Session, step: int) -> pb.Answer:
        ready = pb.Ready(member=QuorumMember(replica_id=session.name, step=step, world_size=1))
        return session.session.ask(ready, deadline)

    with pytest.raises(RuntimeError, match="step is"):
        ask(first, 2**63 - 1)
    assert ask(first, 3).grant.stands
    with ThreadPoolExecutor(1) as pool:
        second = Session(lighthouse.address(), "b", standing=True)
        joining = pool.submit(lambda: ask(second, 0))
        wait_until(lambda: lighthouse._service._core._change is not None)
        first.session._outbox.put(pb.SessionUp(ack=pb.Ack(change=1, step=2**63 - 1)))
        first.session._outbox.put(pb.SessionUp(ack=pb.Ack(change=1, step=3)))
        wait_until(lambda: lighthouse._service._core._change.step == 4)
        assert ask(first, 4).grant.views[0].quorum_id == joining.result(20).grant.views[0].quorum_id == 2
    for closing in (first, second):
        closing.close()
    lighthouse.shutdown()


def test_garbage_instead_of_a_hello_is_refused() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 1)
    channel = open_channel(lighthouse.address())
    for first in (b"", b"\xff" * 10, pb.SessionUp(beat=pb.Beat()).SerializeToString()):
        call = channel.stream_stream("/torchft.SessionService/Session", None, None)(iter([first]))
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
        assert refused.value.code() != grpc.StatusCode.OK
    channel.close()
    lighthouse.shutdown()
