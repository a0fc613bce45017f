"""The Manager with real servers, sockets and gloo groups; each replica group is a thread."""

from __future__ import annotations

import gc
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp

from tests.groups import TIMEOUT, Groups, Replica, running
from torchft.checkpointing.pg_transport import PGTransport
from torchft.coordination import ManagerClient
from torchft.group import Group, join_group
from torchft.manager import Manager, WorldSizeMode
from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ManagedProcessGroup,
    ProcessGroupGloo,
)
from torchft.runtime.fork import DESCRIPTORS
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
        end += 1  # the very next step; who has begun it before it hears that a is gone tries it again
        three.together(lambda: train(b, 1.0), lambda: train(spare, 3.0))
        assert [r.manager.participating_rank() for r in (b, spare)] == [0, 1]
        assert [r.manager.current_step() for r in (b, spare)] == [end] * 2
        assert b.model.bias.grad is not None
        assert float(b.model.bias.grad[0]) == 2.0
        assert b.weights() == spare.weights()


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


def test_a_process_group_is_one_managers_until_that_is_shut_down(groups: Groups) -> None:
    pg = ProcessGroupGloo(timeout=TIMEOUT)
    a = groups.replica("a", pg=FakeProcessGroupWrapper(pg))
    wrapped = FakeProcessGroupWrapper(ErrorSwallowingProcessGroupWrapper(pg))
    for shared in (pg, wrapped):
        with pytest.raises(
            ValueError, match=rf"another Manager's already, that of {a.manager.replica_id()}.* shutdown\(\)"
        ):
            groups.replica("b", pg=shared)
    a.step()
    a.manager.shutdown()
    b = groups.replica("b", pg=wrapped)
    b.step()
    a.manager.shutdown()  # the group is no longer its own
    b.step()
    assert (a.manager.current_step(), b.manager.current_step()) == (1, 2)


def test_of_two_managers_made_at_once_with_one_process_group_one_is_refused(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    pg, joined, quicker = ProcessGroupGloo(timeout=TIMEOUT), [], []

    def join(**arguments: Any) -> Group:
        group = join_group(**arguments)
        joined.append(group)
        if not quicker:
            quicker.append(None)
            quicker[0] = groups.replica("b", pg=pg)
        return group

    monkeypatch.setattr("torchft.manager.join_group", join)
    with pytest.raises(ValueError, match="another Manager's already, that of b:"):
        groups.replica("a", pg=pg)
    with pytest.raises(RuntimeError, match="not reachable"):
        ManagerClient(joined[0].server.address(), TIMEOUT, wait=False)._checkpoint_metadata(0, TIMEOUT)
    quicker[0].step()
    assert quicker[0].manager.current_step() == 1


def test_a_group_that_hands_its_collectives_to_a_manager_carries_them_for_none(groups: Groups) -> None:
    a = groups.replica("a").manager
    for pg in (ManagedProcessGroup(a), FakeProcessGroupWrapper(ManagedProcessGroup(a))):
        with pytest.raises(TypeError, match=r"hands its collectives to a Manager.* ProcessGroupGloo\(\)"):
            Manager(pg, None, None, 1)


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


@pytest.mark.parametrize("mode", WorldSizeMode)
def test_a_committed_step_in_which_nothing_was_averaged_is_said_once(
    pair: Groups, caplog: pytest.LogCaptureFixture, mode: WorldSizeMode
) -> None:
    a, b = pair.replica("a", world_size_mode=mode), pair.replica("b", world_size_mode=mode)

    def unwrapped(replica: Replica) -> None:
        replica.optimizer.zero_grad()
        replica.optimizer.step()

    pair.together(a.step, b.step)
    assert "nothing was averaged" not in caplog.text
    for _ in range(2):
        pair.together(lambda: unwrapped(a), lambda: unwrapped(b))
    assert a.manager.current_step() == 3
    assert caplog.text.count("nothing was averaged") == 2, "once in each group"


def test_a_backward_pass_before_the_first_step_is_an_error_that_says_what_to_call(groups: Groups) -> None:
    a = groups.replica("a")
    a.compute(1.0)
    assert "zero_grad() of torchft's Optimizer" in str(a.manager.errored())
    a.step()
    assert a.manager.current_step() == 1


def test_a_group_alone_need_not_average(groups: Groups, caplog: pytest.LogCaptureFixture) -> None:
    a = groups.replica("a")
    a.optimizer.zero_grad()
    a.optimizer.step()
    assert a.manager.current_step() == 1
    assert "nothing was averaged" not in caplog.text


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


@pytest.mark.parametrize("late_step", ["default_transport", "QuorumPhase", "leave_at_the_end"])
def test_a_manager_that_cannot_be_set_up_leaves_nothing_behind(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, late_step: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("too many open files")

    pg = ProcessGroupGloo(timeout=TIMEOUT)
    first = groups.replica("a", pg=pg)  # what all of them share, gRPC's threads for instance, is there then
    first.step()
    first.manager.shutdown()
    threads, ports = set(threading.enumerate()), listening()
    with monkeypatch.context() as patch:
        patch.setattr(f"torchft.manager.{late_step}", fail)
        with pytest.raises(OSError, match="too many open files"):
            groups.replica("b", pg=pg)
    wait_until(
        lambda: all(t in threads or not t.name.startswith("torchft-") for t in threading.enumerate()), timeout=60
    )

    def all_closed() -> bool:
        gc.collect()  # the group's store ends with the last that knows it
        return listening() <= ports

    wait_until(all_closed, timeout=60)
    again = groups.replica("b", pg=pg)  # it is not claimed either
    again.step()
    assert again.manager.current_step() >= 1


def listening() -> set[int]:
    """The ports on which this process listens."""
    found: set[int] = set()
    for name in os.listdir(DESCRIPTORS):
        try:
            own = os.dup(int(name))
        except OSError:
            continue  # closed meanwhile
        try:
            sock = socket.socket(fileno=own)
        except OSError:
            os.close(own)  # no socket
            continue
        with sock:
            inet = sock.family in (socket.AF_INET, socket.AF_INET6)
            if inet and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(sock.getsockname()[1])
    return found
