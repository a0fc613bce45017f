"""LocalSGD: its arithmetic, and what it promises when groups fail and join."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import nn

from tests.groups import TIMEOUT, Groups, Replica
from tests.local_sgd.job import Goal, gradient, imagined, inner_step, raw, replace_model, uneven_model, values
from torchft.local_sgd import LocalSGD
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import FakeProcessGroupWrapper, ProcessGroupGloo

EVERY = 3


def replica(groups: Groups, name: str, seed: int, use_async_quorum: bool = True, **kwargs: object) -> Replica:
    r = groups.replica(name, use_async_quorum=use_async_quorum, **kwargs)
    replace_model(r, seed)
    return r


def train(r: Replica, group: int, until: int | Goal, after: Callable[[int], None] = lambda step: None) -> None:
    """Until the manager's step is ``until``."""
    steps = count()
    while r.manager.current_step() < (until if isinstance(until, int) else until.step):
        step = next(steps)
        inner_step(r.model, r.inner, group, step)
        after(step)


def test_follows_the_algorithm_of_the_paper_and_drops_a_window_that_is_not_committed() -> None:
    steps, lr, failing = 12, 0.3, 1

    def run(manager: Manager, group: int) -> nn.Module:
        model = uneven_model(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        with LocalSGD(manager, model, optimizer, EVERY):
            for step in range(steps):
                inner_step(model, optimizer, group, step)
        return model

    expected = values(uneven_model(dtype=torch.float64))
    for window in range(steps // EVERY):
        local = [[p.clone() for p in expected] for _ in range(3)]
        for group in range(3):
            for step in range(window * EVERY, (window + 1) * EVERY):
                local[group] = [p - lr * gradient(group, step, p) for p in local[group]]
        if window != failing:
            expected = [torch.stack(parts).mean(0) for parts in zip(*local, strict=True)]

    for model in imagined(3, run, fails=[failing]):
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_two_groups_have_identical_parameters_after_each_window(pair: Groups, use_async_quorum: bool) -> None:
    a, b = (replica(pair, n, s, use_async_quorum) for n, s in (("a", 1), ("b", 2)))
    seen: dict[str, list[bytes]] = {"a": [], "b": []}

    def run(r: Replica, name: str, group: int) -> None:
        with LocalSGD(r.manager, r.model, r.inner, EVERY) as local_sgd:
            for step in range(4 * EVERY):
                inner_step(r.model, r.inner, group, step)
                if step % EVERY == EVERY - 1:
                    seen[name].append(raw(r.model))
                    assert raw(r.model) == raw(list(local_sgd.state_dict()["parameters"].values()))
            assert local_sgd.bytes_reduced == 4 * len(raw(r.model))

    pair.together(lambda: run(a, "a", 0), lambda: run(b, "b", 1))
    assert seen["a"] == seen["b"]
    assert len(set(seen["a"])) == 4
    assert a.manager.current_step() == b.manager.current_step() == 4


@pytest.mark.parametrize("model_registered", ["first", "last"])
@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_a_joiner_receives_the_synchronised_parameters(
    groups: Groups, use_async_quorum: bool, model_registered: str
) -> None:
    def make(name: str, seed: int) -> tuple[Replica, LocalSGD]:
        last = model_registered == "last"
        none = {"load_state_dict": None, "state_dict": None} if last else {}
        r = replica(groups, name, seed, use_async_quorum, **none)
        local_sgd = LocalSGD(r.manager, r.model, r.inner, EVERY)
        if last:
            r.manager.register_state_dict_fn("model", r.load, r.save)
        return r, local_sgd

    a, local_a = make("a", 1)
    synchronised: dict[int, bytes] = {}
    with local_a:
        train(a, 0, 3, lambda step: synchronised.setdefault(a.manager.current_step(), raw(a.model)))
        inner_step(a.model, a.inner, 0, 100)  # it has gone on since, and is asked in mid-window
        b, local_b = make("b", 2)
        at_start: list[bytes] = []
        participants: list[int] = []
        goal = Goal()

        def joined(step: int) -> None:
            if b.manager.current_step():
                goal.set_after(b.manager.current_step())

        def run_b() -> None:
            average = b.manager.allreduce

            def spy(tensor: torch.Tensor, **kwargs: bool) -> object:
                work = average(tensor, **kwargs)
                if not at_start:
                    b.manager.wait_quorum()
                    pending = b.manager._state._pending
                    state = pending["LocalSGD"] if pending else local_b.state_dict()
                    at_start.append(raw(list(state["parameters"].values())))
                    participants.append(b.manager.num_participants())
                    if not use_async_quorum:
                        assert raw(b.model) == at_start[0]
                return work

            b.manager.allreduce = spy  # type: ignore[method-assign, assignment]
            with goal.given_up_on_error(), local_b:
                train(b, 1, goal, joined)

        def run_a() -> None:
            train(a, 0, goal, lambda step: synchronised.setdefault(a.manager.current_step(), raw(local_a_copy())))

        def local_a_copy() -> list[torch.Tensor]:
            return list(local_a.state_dict()["parameters"].values())

        groups.together(run_a, run_b)
    assert at_start[0] in synchronised.values()
    assert participants == [1 if use_async_quorum else 2]
    assert raw(a.model) == raw(b.model) == raw(local_a_copy())


Seen = dict[str, list[tuple[int, bytes]]]


def train_with_a_bad_window(pair: Groups, a: Replica, b: Replica, harm: Callable[[], None]) -> Seen:
    """What ``a`` and ``b`` are at the end of each window; in the second one, ``a`` comes to harm."""
    seen: Seen = {"a": [], "b": []}

    def run(r: Replica, name: str, group: int) -> None:
        with LocalSGD(r.manager, r.model, r.inner, EVERY):

            def after(step: int) -> None:
                if step % EVERY == EVERY - 1:
                    seen[name].append((r.manager.current_step(), raw(r.model)))
                if r is a and step == 2 * EVERY - 2:
                    harm()

            train(r, group, 4, after)

    pair.together(lambda: run(a, "a", 0), lambda: run(b, "b", 1))
    assert seen["a"][0] == seen["a"][1]  # restored, bit by bit
    return seen


def test_a_window_in_which_a_collective_fails_is_discarded(pair: Groups) -> None:
    fake = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=TIMEOUT))
    a, b = replica(pair, "a", 1, pg=fake), replica(pair, "b", 2)
    seen = train_with_a_bad_window(pair, a, b, lambda: fake.report_future_error(RuntimeError("injected")))
    after_step_of_b = dict(seen["b"])
    assert all(after_step_of_b[step] == weights for step, weights in seen["a"])
    assert seen["a"][-1][0] == seen["b"][-1][0] == 4


@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_an_error_reported_between_two_synchronisations_discards_the_window(
    pair: Groups, use_async_quorum: bool
) -> None:
    a, b = (replica(pair, n, s, use_async_quorum) for n, s in (("a", 1), ("b", 2)))
    train_with_a_bad_window(pair, a, b, lambda: a.manager.report_error(RuntimeError("a bad batch")))
    assert raw(a.model) == raw(b.model)
    assert a.manager.current_step() == b.manager.current_step() == 4


@pytest.mark.parametrize("use_async_quorum", [True, False])
def test_a_reported_error_is_not_forgotten_when_the_window_ends(groups: Groups, use_async_quorum: bool) -> None:
    # Without proactive recovery the report aborts nothing: only the vote can know of it.
    a = replica(groups, "a", 1, use_async_quorum, proactive_recovery=False)
    with LocalSGD(a.manager, a.model, a.inner, EVERY):
        train(a, 0, 2)
        before = raw(a.model)
        for step in range(EVERY):
            a.manager.report_error(RuntimeError("a bad batch"))
            inner_step(a.model, a.inner, 0, step)
        assert (a.manager.current_step(), raw(a.model)) == (2, before)
        for step in range(EVERY):  # the old error is not one of the next window
            inner_step(a.model, a.inner, 0, step)
        assert a.manager.current_step() == 3


def test_the_parameters_of_a_durable_checkpoint_come_back(groups: Groups) -> None:
    a, b = replica(groups, "a", 1), replica(groups, "b", 2)
    saved = LocalSGD(a.manager, a.model, a.inner, EVERY).state_dict()
    other = LocalSGD(b.manager, b.model, b.inner, EVERY)
    other.load_state_dict(saved)
    assert raw(a.model) == raw(b.model)
    with pytest.raises(ValueError, match="the models differ"):
        other.load_state_dict({"parameters": {"weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"\(1,\) in the state"):
        other.load_state_dict({"parameters": {**saved["parameters"], "0.bias": torch.zeros(1)}})
    assert raw(a.model) == raw(b.model)


def test_steps_are_counted_inside_the_with_block_only(groups: Groups) -> None:
    a = replica(groups, "a", 1)
    local_sgd = LocalSGD(a.manager, a.model, a.inner, 1)
    inner_step(a.model, a.inner, 0, 0)
    with local_sgd:
        inner_step(a.model, a.inner, 0, 1)
        with pytest.raises(RuntimeError, match="entered already"):
            local_sgd.__enter__()
    inner_step(a.model, a.inner, 0, 2)
    assert a.manager.current_step() == 1
    with local_sgd:
        inner_step(a.model, a.inner, 0, 3)
    assert a.manager.current_step() == 2


def test_wrong_arguments_are_refused_by_name(groups: Groups) -> None:
    a = replica(groups, "a", 1)
    with pytest.raises(ValueError, match="sync_every is 0"):
        LocalSGD(a.manager, a.model, a.inner, 0)
    with pytest.raises(ValueError, match="wrapper"):
        LocalSGD(a.manager, a.model, OptimizerWrapper(a.manager, a.inner), 2)
    with pytest.raises(ValueError, match="nothing to train"):
        LocalSGD(a.manager, a.model.requires_grad_(False), a.inner, 2)
