"""A group whose rank 0 is cut off: the other ranks hear of it, wait for nothing, and go on if it comes back."""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.groups import Groups, Replica, running
from torchft.group_loss import GroupLoss
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until

TIMEOUT = 2.5
"""After which a rank of these groups counts as dead."""
SILENT = "rank 0 of this group is no longer there: no sign of life for"
MINUTE = timedelta(seconds=60)


class Pair:
    """A group of two ranks, rank 1 of which reaches rank 0 over a link."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.first = self._rank(0)
        address = self._store.get("torchft/group/0/manager_address").decode()
        self.link = Link(address)
        self._store.set("torchft/group/0/manager_address", f"http://{self.link.address}")
        self.other = self._rank(1)
        self.step()
        self.step()
        assert self.committed == [2, 2]

    def _rank(self, rank: int) -> Replica:
        where = {"store_addr": "127.0.0.1", "store_port": self._store.port}
        return self.groups.replica("g", rank=rank, world_size=2, timeout=MINUTE, quorum_timeout=MINUTE, **where)

    @property
    def committed(self) -> list[int]:
        return [r.manager.current_step() for r in (self.first, self.other)]

    def begin(self) -> None:
        self.groups.together(self.first.optimizer.zero_grad, self.other.optimizer.zero_grad)
        self.groups.together(self.first.manager.wait_quorum, self.other.manager.wait_quorum)

    def end(self) -> None:
        self.groups.together(lambda: self.first.compute(1.0), lambda: self.other.compute(1.0))
        self.groups.together(self.first.optimizer.step, self.other.optimizer.step)

    def step(self) -> None:
        self.begin()
        self.end()

    def cut_off(self) -> None:
        """Returns when both ranks know."""
        self.link.block()
        wait_until(lambda: SILENT in str(self.other.manager.errored()), timeout=30)
        wait_until(lambda: "rank 1" in str(self.first.manager.errored()), timeout=30)

    def close(self) -> None:
        self.groups.close()
        self.link.close()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    for module in ("torchft.group", "torchft.coordination.rank_sessions", "torchft.coordination.manager_server"):
        monkeypatch.setattr(f"{module}.RANK_HEARTBEAT_TIMEOUT", TIMEOUT)
    with running(heartbeat_timeout_ms=60_000) as groups:
        pair = Pair(groups)
        yield pair
        pair.close()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """Why a process would have ended."""
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr("torchft.manager.GroupLoss", functools.partial(GroupLoss, end=ends.put))
    return ends


def test_a_rank_0_that_is_back_in_time_costs_its_group_a_step(pair: Pair, ends: queue.SimpleQueue[str]) -> None:
    pair.other.manager.end_with_group(MINUTE)
    pair.begin()
    pair.cut_off()
    pair.link.unblock()
    session = pair.other.manager._group.session
    assert session is not None
    wait_until(lambda: session.stands, timeout=30)
    loss = pair.other.manager._loss
    assert loss is not None
    assert loss._timer is None, "the end was called off"
    pair.end()
    assert pair.committed == [2, 2], "the step in which it was missed"
    pair.step()
    assert pair.committed == [3, 3]
    assert ends.empty()


def test_nobody_waits_for_a_silent_rank_0(pair: Pair, ends: queue.SimpleQueue[str]) -> None:
    manager = pair.other.manager
    client, step = manager._group.client, manager.current_step()
    manager.end_with_group(timedelta(seconds=0.1))
    pair.begin()
    server = pair.first.manager._group.server
    assert server is not None
    asking, voting = server._quorum_round._gather, server._group_vote._ballots
    asks: list[Future[object]] = [pair.groups.start(lambda: client._quorum(1, step, "", False, MINUTE, 0))]
    wait_until(lambda: asking.waiting, timeout=30, what="the question")  # one that comes after a vote ends it
    asks.append(pair.groups.start(lambda: client.vote(1, step, True, MINUTE)))
    wait_until(lambda: voting, timeout=30, what="the vote")
    pair.cut_off()
    asks.append(pair.groups.start(lambda: client.vote(1, step, True, MINUTE)))
    for ask in asks:
        with pytest.raises(RuntimeError, match="not reachable"):
            ask.result(timeout=30)
    assert SILENT in ends.get(timeout=30)


def test_a_store_that_torchrun_names_by_loopback_is_told_to_others_as_they_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with running() as groups:
        monkeypatch.setenv("TORCHFT_HOST", "192.0.2.9")
        replica = groups.replica("g", store_addr="127.0.0.1", store_port=store.port)
        replica.step()
        last = replica.manager._begin._last
        assert last is not None
        assert last.store_address == f"192.0.2.9:{store.port}"


def test_a_group_tells_also_of_its_own_store_under_the_host_name_that_it_was_given() -> None:
    with running() as groups:
        replica = groups.replica("g", hostname="127.0.0.3")
        replica.step()
        last = replica.manager._begin._last
        assert last is not None
        assert last.store_address.startswith("127.0.0.3:")


@pytest.mark.parametrize(("name", "message"), [("bad\udcff", "which is no text"), ("x" * 1001, "has 1001 characters")])
def test_a_name_that_cannot_be_told_is_refused_at_once(groups: Groups, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups.replica(name)
