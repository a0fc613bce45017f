"""The Manager with real servers, sockets and gloo groups; each replica group is a thread."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp
from torch.futures import Future

from tests.groups import TIMEOUT, Groups, Replica, running
from torchft.checkpointing.pg_transport import PGTransport
from torchft.coordination import LighthouseServer
from torchft.core.standing_member import MayCommit
from torchft.manager import Manager, WorldSizeMode
from torchft.process_group import FakeProcessGroupWrapper, ProcessGroupGloo
from torchft.testing.wait import wait_until


def test_one_group_trains_alone(groups: Groups) -> None:
    a = groups.replica("a")
    before = a.weights()
    for _ in range(3):
        a.step()
    assert a.manager.current_step() == 3
    assert a.manager.batches_committed() == 3
    assert a.weights() != before


def test_gradients_are_the_average_over_the_participants(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")
    pair.together(a.step, b.step)  # the first step heals b

    def step(r: Replica, value: float) -> float:
        r.optimizer.zero_grad()
        r.compute(value)
        r.optimizer.step()
        assert r.model.bias.grad is not None
        return float(r.model.bias.grad[0])

    assert pair.together(lambda: step(a, 1.0), lambda: step(b, 4.0)) == [2.5, 2.5]
    assert a.manager.batches_committed() == b.manager.batches_committed() == 4
    assert a.weights() == b.weights()


@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_at_step_0_all_groups_take_the_primarys_weights(pair: Groups, use_async_quorum: bool) -> None:
    a = pair.replica("a", seed=1, use_async_quorum=use_async_quorum)
    b = pair.replica("b", seed=2, use_async_quorum=use_async_quorum)
    assert a.weights() != b.weights()
    for _ in range(3):
        pair.together(a.step, b.step)
        assert a.weights() == b.weights()
    assert a.manager.current_step() == 3


def test_without_init_sync_nobody_heals_at_step_0(pair: Groups) -> None:
    a, b = pair.replica("a", seed=1, init_sync=False), pair.replica("b", seed=2, init_sync=False)
    pair.together(a.step, b.step)
    assert a.weights() != b.weights()
    assert a.manager.num_participants() == 2


@pytest.mark.parametrize("transport", ["http", "pg", "pg in place"])
@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_a_late_joiner_gets_the_live_state(groups: Groups, use_async_quorum: bool, transport: str) -> None:
    def make(name: str, seed: int) -> Replica:
        if transport == "http":
            return groups.replica(name, seed=seed, use_async_quorum=use_async_quorum)
        pg = ProcessGroupGloo(timeout=TIMEOUT)
        mine: list[Replica] = []
        live = (lambda: {"user": {"default": mine[0].save()}}) if transport == "pg in place" else None
        moved = PGTransport(pg, timeout=TIMEOUT, device=torch.device("cpu"), state_dict=live)
        mine.append(
            groups.replica(name, seed=seed, pg=pg, checkpoint_transport=moved, use_async_quorum=use_async_quorum)
        )
        return mine[0]

    a = make("a", 1)
    for _ in range(5):
        a.step()
    b = make("b", 2)
    participants: list[int] = []

    def step_of_b() -> None:
        b.step()
        participants.append(b.manager.num_participants())

    end = groups.train_together((a.manager, a.step), (b.manager, step_of_b), steps=50)
    assert a.manager.current_step() == b.manager.current_step() == end
    assert a.weights() == b.weights()
    assert a.manager.batches_committed() == b.manager.batches_committed()
    # The joiner's first step: beside its forward pass it heals and is not counted; healed before it, it is.
    assert participants[0] == (1 if use_async_quorum else 2)
    assert participants[-1] == 2


def test_a_spare_follows_the_state_and_contributes_nothing(pair: Groups) -> None:
    kwargs = {"world_size_mode": WorldSizeMode.FIXED_WITH_SPARES, "min_replica_size": 1}
    a, b = pair.replica("a", **kwargs), pair.replica("b", **kwargs)
    for _ in range(3):
        pair.together(lambda: a.step(1.0), lambda: b.step(100.0))
    assert a.weights() == b.weights()
    assert a.manager.num_participants() == b.manager.num_participants() == 1
    assert [a.manager.participating_rank(), b.manager.participating_rank()] == [0, None]
    assert a.model.bias.grad is not None
    assert float(a.model.bias.grad[0]) == 1.0


def test_a_group_tells_the_history_of_its_state_also_of_a_healed_one(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")
    assert a.manager._progress.lineage == 0
    pair.together(a.step, b.step)
    pair.together(a.step, b.step)
    assert a.manager._progress.lineage == b.manager._progress.lineage > 0
    late = pair.replica("c")
    healed = pair.start(late.step)
    told = set()
    while not healed.done():
        pair.together(a.step, b.step)
        told.add((a.manager.current_step(), a.manager._progress.lineage))
    healed.result()
    assert (late.manager.current_step(), late.manager._progress.lineage) in told
    a.manager.load_state_dict(a.manager.state_dict())
    assert a.manager._progress.lineage == 0, "what a state from elsewhere comes from is not known"


def test_a_spare_takes_over_in_the_next_step_when_a_participant_is_gone() -> None:
    kwargs = {"world_size_mode": WorldSizeMode.FIXED_WITH_SPARES, "min_replica_size": 2}
    with running(min_replicas=2, join_timeout_ms=10_000) as three:
        a, b = three.replica("a", **kwargs), three.replica("b", **kwargs)
        three.together(lambda: a.step(1.0), lambda: b.step(1.0))
        spare = three.replica("c", **kwargs)
        end = 1_000_000

        def train(replica: Replica, value: float) -> None:
            while replica.manager.current_step() < end:
                replica.step(value)

        def join() -> None:
            nonlocal end
            for _ in range(3):
                spare.step(100.0)
            end = spare.manager.current_step() + 3  # the others cannot be further ahead: it is one of them
            train(spare, 100.0)

        three.together(lambda: train(a, 1.0), lambda: train(b, 1.0), join)
        assert [r.manager.participating_rank() for r in (a, b, spare)] == [0, 1, None]
        assert [r.manager.current_step() for r in (a, b, spare)] == [end] * 3
        assert a.weights() == spare.weights()

        a.manager.leave("its host is taken down")
        three.together(lambda: b.step(1.0), lambda: spare.step(3.0))
        assert [r.manager.participating_rank() for r in (b, spare)] == [0, 1]
        assert [r.manager.current_step() for r in (b, spare)] == [end + 1] * 2  # in the very next step
        assert b.model.bias.grad is not None
        assert float(b.model.bias.grad[0]) == 2.0
        assert b.weights() == spare.weights()


def test_a_step_with_too_few_participants_is_not_committed(groups: Groups) -> None:
    a = groups.replica("a", min_replica_size=2)
    before = a.weights()
    a.step()
    assert a.manager.current_step() == 0
    assert a.weights() == before


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


def test_average_needs_floating_point_and_sum_does_not(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")
    pair.together(a.step, b.step)

    def count(r: Replica) -> int:
        r.optimizer.zero_grad()
        tensor = torch.ones(2, dtype=torch.int64)
        with pytest.raises(ValueError, match="floating point"):
            r.manager.allreduce(tensor)
        r.manager.allreduce(tensor, reduce_op=ReduceOp.SUM).wait()
        assert r.manager.should_commit()
        return int(tensor[0])

    assert pair.together(lambda: count(a), lambda: count(b)) == [2, 2]


def test_quantized_reductions_mean_what_exact_ones_do(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")

    def step(r: Replica, value: float) -> list[float]:
        r.optimizer.zero_grad()
        with pytest.raises(ValueError, match="SUM or AVG"):
            r.manager.allreduce(torch.ones(2), should_quantize=True, reduce_op=ReduceOp.MAX)
        with pytest.raises(ValueError, match="floating point"):
            r.manager.allreduce(torch.ones(2, dtype=torch.int32), should_quantize=True, reduce_op=ReduceOp.SUM)
        tensors = [torch.full((100 + i,), value + i) for i in range(12)]
        works = [
            r.manager.allreduce(t, should_quantize=i % 3 != 0, reduce_op=ReduceOp.SUM if i % 2 else ReduceOp.AVG)
            for i, t in enumerate(tensors)
        ]
        for work, tensor in zip(works, tensors, strict=True):
            assert work.wait(TIMEOUT)
            assert work.get_future().value() is tensor
        r.optimizer.step()
        assert all(t.unique().numel() == 1 for t in tensors)
        return [float(t[0]) for t in tensors]

    def both(x: float, y: float) -> list[float]:
        mine, theirs = pair.together(lambda: step(a, x), lambda: step(b, y))
        assert mine == theirs
        return mine

    # In the first step one of them heals: it contributes zeros.
    healed = both(1.0, 1.0)
    assert healed == pytest.approx([(1.0 + i) / (1 if i % 2 else 2) for i in range(12)], rel=1e-6)
    summed = both(1.0, 4.0)
    assert summed == pytest.approx([(5.0 + 2 * i) / (1 if i % 2 else 2) for i in range(12)], rel=1e-6)
    assert a.manager.current_step() == b.manager.current_step() == 2

    # An error in the middle costs the step, and nothing that waits for its turn is issued in the next one.
    def failing() -> None:
        a.optimizer.zero_grad()
        works = [a.manager.allreduce(torch.ones(5000), should_quantize=True) for _ in range(20)]
        a.manager.report_error(RuntimeError("bad batch"))
        assert all(w.wait(TIMEOUT) for w in works)
        a.optimizer.step()

    pair.together(failing, lambda: step(b, 1.0))
    assert [a.manager.current_step(), b.manager.current_step()] == [2, 2]
    assert both(2.0, 4.0)[:2] == pytest.approx([3.0, 8.0], rel=1e-6)
    assert a.manager.current_step() == b.manager.current_step() == 3


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


def test_two_groups_of_two_ranks_train_and_a_group_of_them_heals(groups: Groups) -> None:
    from torch.distributed import TCPStore

    def make_group(name: str, seed: int) -> list[Replica]:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        kwargs: dict[str, Any] = {"store_addr": "127.0.0.1", "store_port": store.port, "world_size": 2, "seed": seed}
        ranks = groups.together(*(lambda r=r: groups.replica(name, rank=r, **kwargs) for r in (0, 1)))
        ranks[0].store = store  # type: ignore[attr-defined]
        return ranks

    def train(r: Replica, until: int) -> None:
        while r.manager.current_step() < until:
            r.step()

    a = make_group("a", 1)
    groups.together(*(lambda r=r: train(r, 4) for r in a))
    b = make_group("b", 2)
    assert b[0].manager.replica_id() == b[1].manager.replica_id()
    end = groups.train_together(*((r.manager, r.step) for r in [*a, *b]), steps=50)
    assert {r.weights() for r in [*a, *b]} == {a[0].weights()}
    assert {r.manager.current_step() for r in [*a, *b]} == {end}


def test_a_broken_in_place_heal_leaves_a_replica_that_asks_as_one_without_state(groups: Groups) -> None:
    class Breaking(PGTransport):  # type: ignore[type-arg]
        broken = 0

        def recv_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            received = super().recv_checkpoint(*args, **kwargs)
            if self.broken == 0:
                self.broken = 1
                raise RuntimeError("cut off in the middle")
            return received

    a_pg = ProcessGroupGloo(timeout=TIMEOUT)
    a = groups.replica("a", seed=1, pg=a_pg, checkpoint_transport=PGTransport(a_pg, TIMEOUT, torch.device("cpu")))
    for _ in range(3):
        a.step()
    b_pg = ProcessGroupGloo(timeout=TIMEOUT)
    mine: list[Replica] = []
    transport = Breaking(b_pg, TIMEOUT, torch.device("cpu"), state_dict=lambda: {"user": {"default": mine[0].save()}})
    b = groups.replica("b", seed=2, pg=b_pg, checkpoint_transport=transport)
    mine.append(b)
    asked: list[int] = []
    real = b.manager._group.client._quorum

    def spy(**kwargs: Any) -> Any:
        asked.append(kwargs["step"])
        return real(**kwargs)

    b.manager._group.client._quorum = spy  # type: ignore[method-assign]

    groups.train_together((a.manager, a.step), (b.manager, b.step))
    assert asked[:2] == [0, -1]
    assert a.weights() == b.weights()


def test_a_replica_without_registered_state_says_so_when_a_peer_needs_it(groups: Groups) -> None:
    a = groups.replica("a", load_state_dict=None, state_dict=None)
    a.step()
    b = groups.replica("b", load_state_dict=None, state_dict=None)
    groups.start(b.step)

    def until_asked() -> str:
        while a.manager.errored() is None:
            a.step()
        return str(a.manager.errored())

    assert "register_state_dict_fn" in groups.start(until_asked).result(60)


def test_groups_that_register_different_state_say_so(groups: Groups) -> None:
    a = groups.replica("a")
    a.step()
    b = groups.replica("b")
    b.manager.register_state_dict_fn("extra", lambda s: None, lambda: {"x": 1})
    errors: list[str] = []

    def train(r: Replica) -> None:
        while not errors:
            r.step()
            if r is b and r.manager.errored() is not None:
                errors.append(str(r.manager.errored()))
        r.manager.leave("the test has seen enough")

    groups.together(lambda: train(a), lambda: train(b))
    assert "['default', 'extra']" in errors[0]


def test_every_registered_piece_of_state_is_healed(groups: Groups) -> None:
    seen: dict[str, Any] = {}
    a = groups.replica("a")
    a.manager.register_state_dict_fn("loader", lambda s: None, lambda: {"position": 41, "name": "train"})
    with pytest.raises(ValueError, match="already"):
        a.manager.register_state_dict_fn("loader", lambda s: None, dict)
    a.step()
    b = groups.replica("b", seed=9)
    b.manager.register_state_dict_fn("loader", seen.update, dict)

    groups.train_together((a.manager, a.step), (b.manager, b.step))
    assert seen == {"position": 41, "name": "train"}


def test_state_is_not_read_while_it_may_not_be(groups: Groups) -> None:
    a = groups.replica("a", timeout=timedelta(seconds=0.2))
    a.manager.disallow_state_dict_read()
    with pytest.raises(TimeoutError, match="being written"):
        a.manager._state.read({}, 0.1)
    a.manager.allow_state_dict_read()
    assert a.manager._state.read({"step": 1}, 0.1)["torchft"] == {"step": 1}


def test_state_dict_brings_step_and_batches_back(groups: Groups) -> None:
    a = groups.replica("a")
    a.manager.load_state_dict({"step": 5, "batches_committed": 9})
    a.step()
    assert a.manager.state_dict() == {"step": 6, "batches_committed": 10}


def test_the_environment_wins_over_arguments(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_TIMEOUT_SEC", "11")
    monkeypatch.setenv("TORCHFT_QUORUM_TIMEOUT_SEC", "12.5")
    monkeypatch.setenv("TORCHFT_CONNECT_TIMEOUT_SEC", "13")
    monkeypatch.setenv("TORCHFT_QUORUM_RETRIES", "4")
    monkeypatch.setenv("TORCHFT_PROACTIVE_RECOVERY", "0")
    a = groups.replica("a").manager
    assert (a._timeout, a._quorum_timeout, a._timeouts.connect) == (
        timedelta(seconds=11),
        timedelta(seconds=12.5),
        timedelta(seconds=13),
    )
    assert a._group.server is not None
    assert a._group.server._lighthouse._quorum_retries == 4
    assert not a._proactive


def test_a_lighthouse_that_is_not_named_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(ValueError, match="TORCHFT_LIGHTHOUSE"):
        Manager(ProcessGroupGloo(), None, None, 1, rank=0, world_size=1)


def test_what_is_no_process_group_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"ProcessGroupGloo\(\)"):
        Manager(ProcessGroupGloo, None, None, 1)  # type: ignore[arg-type]


def test_a_step_of_which_nothing_was_used_goes_on_when_it_is_begun_again(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")

    def step(r: Replica, begin: int) -> bool:
        for _ in range(begin):
            r.optimizer.zero_grad()
        r.compute(1.0)
        return r.manager.should_commit()

    for begin in (1, 2, 3):
        assert pair.together(lambda n=begin: step(a, n), lambda: step(b, 1)) == [True, True]
    assert a.manager.current_step() == b.manager.current_step() == 3
    with pytest.raises(RuntimeError, match="once for each step"):
        a.manager.should_commit()


def test_a_step_left_without_a_vote_is_said_and_costs_no_further_one(
    groups: Groups, caplog: pytest.LogCaptureFixture
) -> None:
    a = groups.replica("a")
    a.step()
    for _ in range(2):
        a.optimizer.zero_grad()
        a.compute(1.0)
    a.optimizer.step()
    assert a.manager.current_step() == 2
    assert caplog.text.count("left without a vote") == 1


def test_a_state_dict_function_that_raises_is_named_with_its_line(pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")
    for r in (a, b):
        r.manager.register_state_dict_fn("extra", lambda state: None, lambda: {}["sampler"])
    pair.together(a.step, b.step)  # one is to heal from the other
    errors = f"{a.manager.errored()} {b.manager.errored()}"
    assert "state dict function 'extra' raised KeyError: 'sampler'" in errors
    assert "test_manager.py, line" in errors


def test_a_store_that_is_not_there_is_a_clear_error(groups: Groups) -> None:
    with pytest.raises(TimeoutError, match=r"127.0.0.1:1 .*torchrun"):
        groups.replica("a", store_addr="127.0.0.1", store_port=1, connect_timeout=timedelta(seconds=0.5))


def test_shutdown_ends_threads_and_can_be_called_twice(groups: Groups) -> None:
    before = set(threading.enumerate())
    a = groups.replica("a")
    a.step()
    a.manager.shutdown()
    a.manager.shutdown()
    ours = lambda: [t for t in threading.enumerate() if t not in before and t.name.startswith("torchft")]  # noqa: E731
    wait_until(lambda: not [t for t in ours() if t.name != "torchft-loop"], what=f"the end of {ours()}")
