"""What fails in a step costs that step and no other: real Managers, each replica group a thread."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import Work
from torch.futures import Future

from tests.groups import TIMEOUT, Groups, Replica
from torchft import reduction
from torchft.coordination import LighthouseServer
from torchft.core.standing_member import MayCommit
from torchft.process_group import FakeProcessGroupWrapper, ProcessGroupGloo
from torchft.testing.wait import wait_until
from torchft.work import FutureWork


def test_a_step_with_too_few_participants_is_not_committed(groups: Groups) -> None:
    a = groups.replica("a", min_replica_size=2)
    before = a.weights()
    a.step()
    assert a.manager.current_step() == 0
    assert a.weights() == before


def test_a_group_that_waits_for_others_does_not_spin(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    a = groups.replica("a", min_replica_size=2)
    pauses: list[float] = []
    monkeypatch.setattr(a.manager._begin._stop, "wait", lambda seconds: pauses.append(seconds))
    for _ in range(10):
        a.step()
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0], "none after the first, as a heal takes one step"
    b = groups.replica("b", min_replica_size=2)
    groups.train_together((a.manager, a.step), (b.manager, b.step))
    assert a.manager._begin.short == 0


def test_more_failures_in_a_row_than_max_retries_end_the_loop(groups: Groups) -> None:
    a = groups.replica("a", min_replica_size=2, max_retries=2)
    a.step()
    a.step()
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        a.step()


def test_a_failed_quorum_is_an_error_of_its_step_and_the_next_one_works() -> None:
    first = LighthouseServer("127.0.0.1:0", 1, heartbeat_timeout_ms=500)
    a = Replica(first.address(), "a", quorum_timeout=timedelta(seconds=2))
    second: LighthouseServer | None = None
    try:
        a.step()
        first.shutdown()
        assert a.manager._group.server is not None
        standing = a.manager._group.server._lighthouse.standing
        # Alone, it could go on for half a heartbeat timeout.
        wait_until(lambda: standing.may_commit() is not MayCommit.YES)
        before = a.weights()
        for _ in range(2):
            a.step()  # raises nothing
            assert "lighthouse" in str(a.manager.errored())
            assert a.manager.num_participants() == 0
            assert a.manager.participating_rank() is None
        assert a.weights() == before
        assert a.manager.current_step() == 1
        second = LighthouseServer(f"127.0.0.1:{first.port}", 1)
        while a.manager.current_step() < 3:
            a.step()
        assert a.manager.errored() is None
    finally:
        a.manager.shutdown()
        first.shutdown()
        if second is not None:
            second.shutdown()


def test_wait_quorum_raises_what_the_quorum_failed_with() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 2)
    a = Replica(lighthouse.address(), "a", quorum_timeout=timedelta(seconds=0.2))
    try:
        with pytest.raises(RuntimeError, match="call start_quorum"):
            a.manager.wait_quorum()
        a.manager.start_quorum()
        with pytest.raises(TimeoutError):
            a.manager.wait_quorum()
        assert not a.manager.should_commit()
    finally:
        a.manager.shutdown()
        lighthouse.shutdown()


def test_a_step_may_be_waited_for_as_long_as_it_takes(groups: Groups) -> None:
    a = groups.replica("a")
    a.manager.start_quorum(timeout=timedelta.max)
    a.compute(1.0)
    assert a.manager.should_commit(timeout=timedelta.max)


def test_quorums_may_fail_for_hours() -> None:
    lighthouse = LighthouseServer("127.0.0.1:0", 2)
    a = Replica(lighthouse.address(), "a", quorum_timeout=timedelta(seconds=0.2))
    try:
        a.manager._begin._failures = 5000
        a.step()
        assert isinstance(a.manager.errored(), TimeoutError)
    finally:
        a.manager.shutdown()
        lighthouse.shutdown()


def test_a_step_fails_as_such_also_where_the_other_ranks_cannot_be_told(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    pg = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=TIMEOUT))
    a = groups.replica("a", pg=pg)

    def gone(*_: object) -> None:
        raise RuntimeError("the group's store is gone")

    monkeypatch.setattr(a.manager._healing._together, "refuse", gone)
    pg.report_configure_error(RuntimeError("injected"))
    a.step()
    assert "injected" in str(a.manager.errored())
    a.step()
    assert a.manager.current_step() == 1


def test_a_group_that_is_behind_and_may_not_heal_commits_nothing_and_says_so_once(
    pair: Groups, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair.replica("a", seed=1), pair.replica("b", seed=2)
    a.manager.load_state_dict({"step": 3, "batches_committed": 5})

    def step(r: Replica, allow_heal: bool) -> bool:
        r.manager.start_quorum(allow_heal=allow_heal)
        r.compute(7.0)
        return r.manager.should_commit()

    before = b.weights()
    for _ in range(2):
        assert pair.together(lambda: step(a, False), lambda: step(b, False)) == [True, False]
        assert (a.manager.num_participants(), b.manager.participating_rank()) == (1, None)
    assert (b.manager.current_step(), b.weights()) == (0, before)
    assert sum("this group commits nothing" in r.getMessage() for r in caplog.records) == 1
    pair.together(lambda: step(a, True), lambda: step(b, True))
    assert a.manager.current_step() == b.manager.current_step() == 6
    assert b.weights() == a.weights()


def test_a_failed_collective_costs_the_step_and_later_ones_in_it_do_nothing(groups: Groups) -> None:
    pg = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=TIMEOUT))
    a = groups.replica("a", pg=pg)
    a.step()
    before = a.weights()
    a.optimizer.zero_grad()
    a.manager.wait_quorum()
    pg.report_future_error(RuntimeError("injected"))
    a.compute(1.0)
    assert "injected" in str(a.manager.errored())
    untouched = torch.ones(3)
    a.manager.allreduce(untouched).wait()
    assert untouched.tolist() == [1.0, 1.0, 1.0]
    a.optimizer.step()
    assert a.weights() == before
    a.step()
    assert a.manager.current_step() == 2
    assert a.manager.errored() is None


def test_an_error_reported_by_the_user_costs_both_groups_only_the_step(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")
    pair.together(a.step, b.step)

    def failing() -> None:
        a.optimizer.zero_grad()
        a.manager.report_error(RuntimeError("bad batch"))
        a.compute(1.0)
        a.optimizer.step()

    pair.together(failing, b.step)
    assert a.manager.current_step() == 1

    def train(r: Replica) -> None:
        while r.manager.current_step() < 5:
            r.step()

    pair.together(lambda: train(a), lambda: train(b))
    assert a.weights() == b.weights()


def test_wrap_future_gives_the_default_and_costs_the_step(groups: Groups) -> None:
    a = groups.replica("a")
    a.optimizer.zero_grad()
    never: Future[int] = Future()
    assert a.manager.wrap_future(never, 7, timeout=timedelta(milliseconds=50)).wait() == 7
    assert isinstance(a.manager.errored(), TimeoutError)
    assert not a.manager.should_commit()

    a.optimizer.zero_grad()
    good: Future[int] = Future()
    wrapped = a.manager.wrap_future(good, 7)
    good.set_result(3)
    assert wrapped.wait() == 3
    assert a.manager.should_commit()


def test_an_error_that_comes_after_its_step_does_not_touch_the_next_one(groups: Groups) -> None:
    a = groups.replica("a", timeout=timedelta(seconds=1))
    a.optimizer.zero_grad()
    late: Future[int] = Future()
    a.manager.wrap_future(late, 0, timeout=timedelta(seconds=60))
    assert not a.manager.should_commit()  # it never came
    a.optimizer.zero_grad()
    a.manager.wait_quorum()
    late.set_exception(RuntimeError("late"))  # type: ignore[arg-type]
    assert a.manager.should_commit()
    assert a.manager.errored() is None


def test_what_is_pending_when_a_step_is_left_writes_to_nothing_in_the_next_one(pair: Groups) -> None:
    a, b = (pair.replica(name, proactive_recovery=False) for name in "ab")
    pair.together(a.step, b.step)
    mine, theirs = torch.ones(3), torch.full((3,), 5.0)
    pair.together(a.manager.start_quorum, b.manager.start_quorum)
    work = a.manager.allreduce(mine)
    a.manager.start_quorum()  # the loop of a has skipped the rest of the batch
    wait_until(work.is_completed)
    mine.fill_(100.0)  # a gradient of the next step
    b.manager.allreduce(theirs).wait()
    assert b.manager.errored() is not None
    assert mine.tolist() == [100.0] * 3


class Stuck(FakeProcessGroupWrapper):
    """A group of which an abort ends no collective."""

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Work:
        return FutureWork(Future())


@pytest.mark.parametrize("ended", ["by its vote", "by the next step"])
def test_a_process_whose_gradients_may_be_written_at_any_time_trains_no_more(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    monkeypatch.setattr(reduction, "_ABORT_GRACE", timedelta(milliseconds=10))
    a = groups.replica("a", pg=Stuck(ProcessGroupGloo(timeout=TIMEOUT)), timeout=timedelta(milliseconds=50))
    a.manager.start_quorum()
    a.manager.allreduce(torch.ones(3))
    calls = [a.manager.should_commit, a.manager.start_quorum, a.manager.should_commit, a.optimizer.zero_grad]
    for call in calls if ended == "by its vote" else calls[1:]:
        with pytest.raises(RuntimeError, match="this process cannot go on safely and must be restarted"):
            call()
    assert a.manager.current_step() == 0
