"""Standing quorums with real Managers, gloo and lighthouses: groups are threads, a lighthouse that is killed a process.

What the machines decide is tested in ``tests/core``; here that the shells ask them, and carry what they say.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.forked import ForkedProgram
from tests.groups import Groups, Replica, running
from torchft.coordination.proto import session_pb2
from torchft.coordination.standing_link import StandingLink
from torchft.coordination.standing_wire import grant_to_wire
from torchft.core.assignment import Seating
from torchft.core.membership import Member, Quorum
from torchft.core.standing_member import MayCommit
from torchft.runtime.logs import RankLogger
from torchft.testing.ports import ReservedPort
from torchft.testing.wait import wait_until


@pytest.fixture
def pair() -> Iterator[Groups]:
    with running(min_replicas=2, heartbeat_timeout_ms=5000) as groups:
        yield groups


def requests(groups: Groups) -> int:
    return groups.lighthouse.counters.quorum_requests


def test_a_lease_runs_out_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    link = StandingLink("a", 1, RankLogger(logging.getLogger(__name__), "a", 0, lambda: 0))
    member = Member("a", world_size=1, standing=True)
    link.welcomed(session_pb2.Welcome(lease_ms=300_000, heartbeat_timeout_ms=5000))
    link.asks(0, 0)
    seating = Seating(Quorum(7, (member,), fenced=True, stands=True))
    link.answered(session_pb2.Answer(grant=grant_to_wire(seating, member, True)))
    link.ended(0, True)
    assert link.stands(1)
    link.ended(1, True)
    asleep = time.clock_gettime(time.CLOCK_BOOTTIME) + 60
    monkeypatch.setattr(time, "clock_gettime", lambda _: asleep)  # and the monotonic clock stood still
    assert not link.stands(2)
    assert link.may_commit() is MayCommit.WAIT


@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_three_hundred_standing_steps_ask_the_lighthouse_nothing(pair: Groups, use_async_quorum: bool) -> None:
    a, b = (pair.replica(name, use_async_quorum=use_async_quorum) for name in "ab")
    pair.together(a.step, b.step)
    before = requests(pair)

    def train(r: Replica) -> None:
        for _ in range(300):
            r.step()

    pair.together(lambda: train(a), lambda: train(b))
    assert requests(pair) == before
    assert a.manager.current_step() == b.manager.current_step() == 301
    assert a.manager.num_participants() == 2
    assert a.weights() == b.weights()


def test_ranks_of_a_standing_group_ask_their_rank_0_only_for_the_commit(pair: Groups) -> None:
    def group(name: str) -> list[Replica]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        where = {"store_addr": "127.0.0.1", "store_port": store.port, "world_size": 2}
        ranks = pair.together(*(lambda r=r: pair.replica(name, rank=r, **where) for r in (0, 1)))
        ranks[0].store = store  # type: ignore[attr-defined]
        return ranks

    replicas = [*group("a"), *group("b")]
    pair.together(*(r.step for r in replicas))
    before = requests(pair)
    asked: list[object] = []
    for r in replicas:
        r.manager._group.client._quorum = asked.append  # type: ignore[method-assign,assignment]

    def train(r: Replica) -> None:
        for _ in range(20):
            r.step()

    pair.together(*(lambda r=r: train(r) for r in replicas))
    assert asked == []
    assert requests(pair) == before
    assert {r.manager.current_step() for r in replicas} == {21}
    assert len({r.weights() for r in replicas}) == 1


class Loop:
    """A replica that trains on a thread until it is told to stop, and what became of its steps."""

    def __init__(self, groups: Groups, replica: Replica) -> None:
        self.replica = replica
        self.errors: list[str] = []
        self.participants: list[tuple[int, int]] = []
        """Of each committed step."""
        self._stop_at: int | None = None
        self._done = groups.start(self._run)

    def _run(self) -> None:
        manager = self.replica.manager
        while self._stop_at is None or manager.current_step() < self._stop_at:
            before = manager.current_step()
            self.replica.step()
            if manager.current_step() > before:
                self.participants.append((before, manager.num_participants()))
            error = manager.errored()
            if error is not None:
                self.errors.append(str(error))

    def committed(self, participants: int) -> int:
        """How many of its steps so far had that many participants."""
        return sum(n == participants for _, n in list(self.participants))

    def stop(self, at: int) -> None:
        self._stop_at = at

    def join(self) -> None:
        self._done.result(timeout=100)


def end(*loops: Loop) -> None:
    """Ends them all at one step: one that all are going to reach together."""
    target = max(loop.replica.manager.current_step() for loop in loops) + 200
    for loop in loops:
        loop.stop(target)
    for loop in loops:
        loop.join()
    assert len({loop.replica.weights() for loop in loops}) == 1


def test_joiner_enters_within_two_steps_of_asking_and_nobody_fails_for_it(pair: Groups) -> None:
    a, b = (Loop(pair, pair.replica(name)) for name in "ab")
    wait_until(lambda: a.committed(2) > 20, timeout=60)
    before = requests(pair)
    newcomer = pair.replica("c")
    core = pair.lighthouse._service._core
    decided: list[tuple[int, int]] = []
    original = core.ack

    def spy(replica_id: str, number: int, step: int, now: float) -> object:
        decided.append((number, step))
        return original(replica_id, number, step, now)

    core.ack = spy  # type: ignore[method-assign,assignment]
    c = Loop(pair, newcomer)
    wait_until(lambda: c.committed(3) > 20, timeout=60)
    (first, _), *_ = c.participants
    assert first <= max(step for number, step in decided if number == decided[0][0]) + 2
    end(a, b, c)
    assert (a.errors, b.errors, c.errors) == ([], [], [])
    assert requests(pair) - before <= 3 * 2 + 2, "one quorum with the joiner, one with all at the same step"


@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_a_step_that_has_not_used_its_quorum_yet_is_not_lost_when_a_member_goes(use_async_quorum: bool) -> None:
    with running(min_replicas=1, heartbeat_timeout_ms=5000) as groups:
        a, b = (groups.replica(name, use_async_quorum=use_async_quorum) for name in "ab")
        loops = [Loop(groups, r) for r in (a, b)]
        wait_until(lambda: loops[0].committed(2) > 3, timeout=60)
        end(*loops)
        step = a.manager.current_step()
        a.optimizer.zero_grad()  # it stands: b is in it
        b.manager.shutdown()
        wait_until(lambda: a.manager._start._used, timeout=60)  # it begins once more
        a.compute(1.0)
        a.optimizer.step()
        assert a.manager.current_step() == step + 1
        assert a.manager.num_participants() == 1


def test_with_a_client_that_keeps_no_session_all_ask_at_each_step(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b", proactive_recovery=False)
    for _ in range(3):
        pair.together(a.step, b.step)
    before = requests(pair)
    for _ in range(10):
        pair.together(a.step, b.step)
    assert requests(pair) == before + 20
    assert a.manager.current_step() == b.manager.current_step() == 13
    assert a.weights() == b.weights()


# ---------------------------------------------------- the lighthouse is gone


SERVE = """
import sys, threading
from torchft.coordination import LighthouseServer
port, min_replicas, state_file = sys.argv[1:]
server = LighthouseServer(f"127.0.0.1:{port}", int(min_replicas), heartbeat_timeout_ms=1000, state_file=state_file)
print(server.port, flush=True)
threading.Event().wait(300)
"""


class Lighthouse:
    """In a process of its own, always at the same address."""

    def __init__(self, state_file: Path) -> None:
        self._state_file = state_file
        self.min_replicas = 2
        self._reserved = ReservedPort()
        self.port = self._reserved.port
        self._process: ForkedProgram | None = None
        self.start()

    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        argv = [sys.executable, "-c", SERVE, str(self.port), str(self.min_replicas), str(self._state_file)]
        self._process = ForkedProgram(argv, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert int(self._process.stdout.readline()) == self.port

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=60)
            self._process = None

    def close(self) -> None:
        self.kill()
        self._reserved.close()


@pytest.fixture
def lighthouse(tmp_path: Path) -> Iterator[Lighthouse]:
    lighthouse = Lighthouse(tmp_path / "lighthouse")
    yield lighthouse
    lighthouse.close()


@pytest.fixture
def groups(lighthouse: Lighthouse) -> Iterator[Groups]:
    groups = Groups(lighthouse)  # type: ignore[arg-type]
    yield groups
    groups.close()


def test_no_step_fails_while_the_lighthouse_is_dead_and_a_joiner_gets_in_when_it_is_back(
    lighthouse: Lighthouse, groups: Groups
) -> None:
    a, b = (Loop(groups, groups.replica(name)) for name in "ab")
    wait_until(lambda: a.committed(2) > 20 and b.committed(2) > 20, timeout=60)
    ids = a.replica.manager._begin.quorum_id
    lighthouse.kill()
    before = a.replica.manager.current_step()
    wait_until(lambda: a.replica.manager.current_step() > before + 100, timeout=60)
    lighthouse.start()
    c = Loop(groups, groups.replica("c"))
    wait_until(lambda: c.committed(3) > 5, timeout=60)
    assert (a.errors, b.errors, c.errors) == ([], [], [])
    assert c.replica.manager._begin.quorum_id > ids
    end(a, b, c)


def test_without_a_lighthouse_and_a_member_the_rest_wait_and_the_error_says_for_whom(
    lighthouse: Lighthouse, groups: Groups
) -> None:
    a, b = groups.replica("a", quorum_timeout=timedelta(seconds=5)), groups.replica("b")
    for _ in range(3):
        groups.together(a.step, b.step)
    assert a.manager.current_step() == b.manager.current_step() == 3
    lighthouse.kill()
    groups.together(a.step, b.step)
    assert a.manager.current_step() == b.manager.current_step() == 4
    b.manager.shutdown(wait=False)  # it cannot say so to anybody: as if it died
    a.step()
    assert a.manager.errored() is not None
    a.step()
    assert f"127.0.0.1:{lighthouse.port}" in str(a.manager.errored())
    assert "did not end within" in str(a.manager.errored())
    lighthouse.min_replicas = 1
    lighthouse.start()
    wait_until(lambda: a.step() or a.manager.current_step() > 4, timeout=60)
