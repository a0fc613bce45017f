"""DiLoCo with real managers, servers and gloo groups: what it promises when groups fail and join."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
import torch

from tests.groups import TIMEOUT, Groups, Replica
from tests.local_sgd.job import Goal, inner_step, raw, replace_model
from torchft.local_sgd import DiLoCo
from torchft.process_group import FakeProcessGroupWrapper, ProcessGroupGloo

EVERY = 6


class Walker:
    """A replica that trains the uneven model with DiLoCo, in three fragments, and notes what it does.

    Args:
        group: of which its gradients are.
        outer: "one" outer optimizer, or one for "each" fragment.
        manager: for the Manager.
        **diloco: for DiLoCo.
    """

    def __init__(
        self,
        groups: Groups,
        name: str,
        group: int,
        outer: str = "one",
        manager: dict[str, Any] | None = None,
        **diloco: Any,
    ) -> None:
        self.replica: Replica = groups.replica(name, use_async_quorum=False, **(manager or {}))
        replace_model(self.replica, seed=group)
        self.model, self.manager, self.group = self.replica.model, self.replica.manager, group
        self.outers = [
            torch.optim.SGD(m.parameters(), lr=0.7, momentum=0.9, nesterov=True)
            for m in ([self.model] if outer == "one" else self.model.children())
        ]
        self.diloco = DiLoCo(
            self.manager,
            list(self.model.children()),
            self.replica.inner,
            self.outers[0] if outer == "one" else self.outers,
            EVERY,
            **diloco,
        )
        if manager and "state_dict" in manager:  # the user registers the model after DiLoCo has registered itself
            self.manager.register_state_dict_fn("model", self.replica.load, self.replica.save)
        self.steps = count()
        self.order: list[tuple[int, tuple[int, ...]]] = []
        """What was all-reduced at which step of the manager."""
        self._allreduce = self.manager.allreduce
        self.manager.allreduce = self._noted  # type: ignore[method-assign]

    def _noted(self, tensor: torch.Tensor, **kwargs: Any) -> Any:
        if tensor.is_floating_point():
            self.order.append((self.manager.current_step(), tuple(tensor.shape)))
        return self._allreduce(tensor, **kwargs)

    def step(self) -> None:
        inner_step(self.model, self.replica.inner, self.group, next(self.steps))

    def train(self, until: int | Goal, after: Callable[[], None] = lambda: None) -> None:
        """Within the block already."""
        while self.manager.current_step() < (until if isinstance(until, int) else until.step):
            self.step()
            after()

    def join(self, goal: Goal) -> None:
        """Trains with a group that is ahead, and sets the goal when it is in."""
        with goal.given_up_on_error(), self.diloco:
            self.train(goal, lambda: self._joined(goal))

    def _joined(self, goal: Goal) -> None:
        if step := self.manager.current_step():
            goal.set_after(step)

    def synchronised(self) -> bytes:
        """All that the groups agree on, bit by bit."""
        state = self.diloco.state_dict()
        tensors = [t for f in state["fragments"] for t in f.values()]
        moments = [s["momentum_buffer"] for o in state["outer_optimizers"] for s in o["state"].values()]
        return raw([*tensors, *(m for m in moments if m is not None)])


def train_both(groups: Groups, a: Walker, b: Walker, until: int) -> None:
    def run(w: Walker) -> None:
        with w.diloco:
            w.train(until)

    groups.together(lambda: run(a), lambda: run(b))


@pytest.mark.parametrize("outer", ["one", "each"])
@pytest.mark.parametrize(("delay", "alpha"), [(0, 0.0), (0, 0.25), (1, 0.0), (1, 0.5)])
def test_two_groups_agree_on_what_is_synchronised(pair: Groups, delay: int, alpha: float, outer: str) -> None:
    options = {"fragment_sync_delay": delay, "fragment_update_alpha": alpha, "outer": outer}
    a, b = Walker(pair, "a", 0, **options), Walker(pair, "b", 1, **options)
    train_both(pair, a, b, 7)
    assert a.synchronised() == b.synchronised()
    assert a.order == b.order
    assert (a.order[0], len(a.order)) == ((0, (35,)), 3 * 2 + 2 + 2 * 2)
    if alpha == 0.0:
        last = lambda w: raw(w.model[0])  # noqa: E731  (the seventh synchronisation is the first fragment's)
        assert last(a) == last(b)
    else:
        assert raw(a.model) != raw(b.model)


def test_buckets_change_no_bit(pair: Groups) -> None:
    ends: list[bytes] = []
    shapes: list[int] = []
    for options in ({}, {"use_bucketization": True}, {"use_bucketization": True, "bucket_cap_mb": 1}):
        a, b = (Walker(pair, f"{n}{len(ends)}", g, **options) for g, n in enumerate("ab"))
        train_both(pair, a, b, 6)
        assert a.synchronised() == b.synchronised()
        ends.append(a.synchronised() + raw(a.model))
        shapes.append(len(a.order))
        for w in (a, b):
            w.manager.shutdown()
    assert len(set(ends)) == 1
    assert shapes == [10, 6, 6]


@pytest.mark.parametrize("delay", [0, 1])
def test_a_failed_synchronisation_restores_its_fragment_and_nothing_else(pair: Groups, delay: int) -> None:
    fake = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=TIMEOUT))
    a = Walker(pair, "a", 0, fragment_sync_delay=delay, manager={"pg": fake})
    b = Walker(pair, "b", 1, fragment_sync_delay=delay)
    seen: list[tuple[int, bytes, list[bytes]]] = []

    def note() -> None:
        seen.append((a.manager.current_step(), a.synchronised(), [raw(m) for m in a.model.children()]))

    begin, finish = a.diloco._begin, a.diloco._finish

    def begin_with_a_fault() -> None:
        if a.manager.current_step() == 4 and not seen:  # fragment 1 is due
            fake.report_future_error(RuntimeError("injected"))
        begin()

    def watched() -> None:
        watch = a.manager.current_step() == 4 and not seen
        if watch:
            note()
        finish()
        if watch:
            note()

    a.diloco._begin, a.diloco._finish = begin_with_a_fault, watched  # type: ignore[method-assign]
    train_both(pair, a, b, 9)
    (step, synchronised, before), (step_after, synchronised_after, after) = seen
    assert step == step_after == 4  # not committed
    assert synchronised == synchronised_after  # the copies and the outer momentum are as they were
    assert (before[0], before[2]) == (after[0], after[2])  # the other fragments stay where they are
    assert before[1] != after[1]  # this one has gone back
    assert after[1] in synchronised
    assert a.synchronised() == b.synchronised()


def test_a_window_whose_error_the_user_reports_is_discarded(pair: Groups) -> None:
    a, b = (Walker(pair, n, g, fragment_sync_delay=1) for g, n in enumerate("ab"))
    states: list[bytes] = []

    def run_a() -> None:
        with a.diloco:
            a.train(3)
            a.step()  # begins
            states.append(a.synchronised())
            a.manager.report_error(RuntimeError("a bad batch"))
            a.step()  # votes
            assert a.manager.current_step() == 3
            states.append(a.synchronised())
            states.append(raw(a.model[0]))
            states.append(raw(list(a.diloco.state_dict()["fragments"][0].values())))
            a.train(9)

    def run_b() -> None:
        with b.diloco:
            b.train(9)

    pair.together(run_a, run_b)
    assert states[0] == states[1]
    assert states[2] == states[3]
    assert a.synchronised() == b.synchronised()


@pytest.mark.parametrize("outer", ["one", "each"])
@pytest.mark.parametrize("delay", [0, 1])
def test_a_joiner_heals_parameters_and_outer_state_and_takes_up_the_same_fragment(
    groups: Groups, delay: int, outer: str
) -> None:
    late = {"load_state_dict": None, "state_dict": None} if outer == "each" else {}
    a = Walker(groups, "a", 0, fragment_sync_delay=delay, outer=outer, manager=late)
    history: dict[int, bytes] = {}
    healed: list[tuple[int, bytes]] = []

    def note() -> None:
        history[a.manager.current_step()] = a.synchronised()

    with a.diloco:
        a.train(4, note)  # not a multiple of the fragments
        a.step()  # in mid-window
        b = Walker(groups, "b", 1, fragment_sync_delay=delay, outer=outer, manager=late)
        begin = b.diloco._window.begin_step

        def spy() -> None:
            begin()
            if not healed:
                healed.append((b.manager.current_step(), b.synchronised()))

        average = b.manager.allreduce

        def first(tensor: torch.Tensor, **kwargs: Any) -> Any:
            if not b.order:
                assert raw(b.model) == raw([t for f in b.diloco.state_dict()["fragments"] for t in f.values()])
            return average(tensor, **kwargs)

        b.manager.allreduce = first  # type: ignore[method-assign]

        b.diloco._window.begin_step = spy  # type: ignore[method-assign]

        goal = Goal()
        groups.together(lambda: a.train(goal, note), lambda: b.join(goal))
    step, state = healed[0]
    assert step >= 4
    assert state == history[step]
    assert b.order == [entry for entry in a.order if entry[0] >= step]
    assert a.synchronised() == b.synchronised()
    assert [o.state_dict()["param_groups"] for o in a.outers] == [o.state_dict()["param_groups"] for o in b.outers]


def test_nobody_steps_while_a_joiner_still_reads(groups: Groups) -> None:
    a = Walker(groups, "a", 0, fragment_sync_delay=1)
    with a.diloco:
        a.train(2)
        b = Walker(groups, "b", 1, fragment_sync_delay=1)
        went_on, healed = threading.Event(), threading.Event()
        state, load = b.manager._state, b.diloco.load_state_dict
        inner_of_source: list[bytes] = []

        def slow(received: Any) -> None:
            assert not went_on.wait(0.3), "the source made an inner step while its state was being read"
            load(received)
            healed.set()

        state.replace("DiLoCo", slow, b.diloco.state_dict)
        begin = a.diloco._begin

        def watched() -> None:
            begin()
            if a.manager.num_participants() == 2:
                went_on.set()
                if not inner_of_source:
                    assert healed.is_set()
                    inner_of_source.append(b"")

        a.diloco._begin = watched  # type: ignore[method-assign]

        goal = Goal()
        groups.together(lambda: a.train(goal), lambda: b.join(goal))
    assert inner_of_source
    assert a.synchronised() == b.synchronised()


def test_an_exception_in_the_loop_ends_what_is_under_way_for_the_others_at_once(pair: Groups) -> None:
    a, b = (Walker(pair, n, g, fragment_sync_delay=1) for g, n in enumerate("ab"))

    def run_a() -> None:
        with a.diloco:
            a.train(2)
            a.step()
            raise KeyError("the loop's own")

    def run_b() -> None:
        with b.diloco:
            b.train(2)
            b.step()
            a_ended.wait(60)
            b.step()

    a_ended = threading.Event()

    def failing() -> None:
        try:
            with pytest.raises(KeyError, match="own"):
                run_a()
            assert isinstance(a.manager.errored(), KeyError)
        finally:
            a_ended.set()

    pair.together(failing, run_b)
    assert a.manager.current_step() == 2
    assert len(a.replica.inner._optimizer_step_post_hooks) == 0


def test_quantized_synchronisation_keeps_the_groups_together(pair: Groups) -> None:
    a, b = (Walker(pair, n, g, should_quantize=True, use_bucketization=True) for g, n in enumerate("ab"))
    try:
        train_both(pair, a, b, 6)
    except NotImplementedError as e:
        pytest.skip(str(e))
    assert a.synchronised() == b.synchronised()


def test_the_copy_may_be_kept_elsewhere_and_a_durable_checkpoint_comes_back(groups: Groups) -> None:
    a = Walker(groups, "a", 0, backup_device=torch.device("cpu"), pin_memory=True)
    with a.diloco:
        a.train(3)
    b = Walker(groups, "b", 1)
    assert a.synchronised() != b.synchronised()
    b.diloco.load_state_dict(a.diloco.state_dict())
    assert a.synchronised() == b.synchronised()
    assert raw(b.model) == raw([t for f in a.diloco.state_dict()["fragments"] for t in f.values()])
    with pytest.raises(ValueError, match="1 fragments"):
        b.diloco.load_state_dict({"fragments": [{}], "outer_optimizers": [{}]})


def test_wrong_arguments_are_refused_by_name(groups: Groups, caplog: pytest.LogCaptureFixture) -> None:
    r = groups.replica("a", use_async_quorum=False)
    replace_model(r, 0)
    pieces = list(r.model.children())
    outer = torch.optim.SGD(r.model.parameters(), lr=0.7)

    def refused(match: str, *args: Any, fragments: Any = pieces, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=match):
            DiLoCo(r.manager, fragments, *(args or (r.inner, outer, EVERY)), **kwargs)

    refused("multiple of the number of fragments, 3", r.inner, outer, 7)
    refused("multiple", r.inner, outer, 0)
    refused("less than sync_every / fragments = 2", fragment_sync_delay=2)
    refused("at least 0", fragment_sync_delay=-1)
    refused("0 to 1", fragment_update_alpha=1.1)
    refused("bucket_cap_mb is 0", bucket_cap_mb=0)
    refused("model_fragments is empty", fragments=[])
    refused("2 outer optimizers for 3", r.inner, [outer, outer], EVERY)
    refused("two, over the same parameters", r.inner, r.inner, EVERY)
    refused("does not hold its parameters", r.inner, torch.optim.SGD(pieces[0].parameters(), lr=1.0), EVERY)
    refused("'weight' of fragment 1", fragments=[pieces[0], pieces[0], pieces[2]])
    refused("wrapper", r.optimizer, outer, EVERY)
    with pytest.raises(TypeError, match=r"\[model\]"):
        DiLoCo(r.manager, r.model, r.inner, outer, EVERY)  # type: ignore[arg-type]
    DiLoCo(r.manager, pieces[:2], r.inner, outer, EVERY)
    assert "2 parameters of the inner optimizer are in no fragment" in caplog.text
    refused("already")
    asynchronous = groups.replica("b", use_async_quorum=True, timeout=timedelta(seconds=5))
    with pytest.raises(ValueError, match="use_async_quorum=False"):
        DiLoCo(asynchronous.manager, pieces, r.inner, outer, EVERY)
