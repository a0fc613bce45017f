"""What is registered with a Manager is what a healing group gets, whole, and what says of which step it is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.groups import TIMEOUT, Groups, Replica
from torchft.checkpointing import StepNotServed
from torchft.checkpointing.pg_transport import PGTransport
from torchft.heal_pause import HealPause
from torchft.process_group import ProcessGroupGloo


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


@pytest.mark.parametrize("use_async_quorum", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("key", ["default", "second"])
def test_what_a_load_function_left_half_written_is_not_committed(
    groups: Groups, use_async_quorum: bool, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[str] = []
    committed: dict[str, dict[int, bytes]] = {"a": {}, "b": {}}

    def step(r: Replica, name: str) -> None:
        before = r.manager.current_step()
        try:
            r.step()
        except OSError as e:
            raised.append(str(e))
            return
        if r.manager.current_step() > before:
            committed[name][r.manager.current_step()] = r.weights()

    def broken(state: dict[str, Any]) -> None:
        if not raised:
            raise OSError("the disk is gone")
        if key == "default":
            b.load(state)

    a, b = (groups.replica(n, seed=i, use_async_quorum=use_async_quorum) for i, n in enumerate("ab"))
    for r in (a, b):
        if key == "second":
            r.manager.register_state_dict_fn("second", (lambda state: None) if r is a else broken, dict)
    if key == "default":
        b.manager.set_state_dict_fns(broken, b.save)
    for _ in range(3):
        a.step()
    groups.train_together((a.manager, lambda: step(a, "a")), (b.manager, lambda: step(b, "b")), steps=6)
    assert raised == ["the disk is gone"]
    both = committed["a"].keys() & committed["b"].keys()
    assert len(both) >= 3
    assert {n for n in both if committed["a"][n] != committed["b"][n]} == set()
    if use_async_quorum:
        lost = [r.getMessage() for r in caplog.records if "is not committed" in r.getMessage()]
        assert not [line for line in lost if line.startswith("[a:")], "it costs the others no step"


def test_the_state_is_not_waited_for_as_long_as_others_would_stand(groups: Groups) -> None:
    a = groups.replica("a")
    a.manager.disallow_state_dict_read()
    with pytest.raises(TimeoutError, match=r"for 0\.1 ?s"):
        a.manager._state.read({}, 0.4)


def what_the_joiner_says(groups: Groups, a: Replica, b: Replica) -> str:
    """Why ``b`` is not healed, while both train."""
    errors: list[str] = []

    def train(r: Replica) -> None:
        while not errors:
            r.step()
            if r is b and r.manager.errored() is not None:
                errors.append(str(r.manager.errored()))
        r.manager.leave("the test has seen enough")

    groups.together(lambda: train(a), lambda: train(b))
    return errors[0]


def test_a_replica_without_registered_state_says_so_when_a_peer_needs_it(
    groups: Groups, caplog: pytest.LogCaptureFixture
) -> None:
    a = groups.replica("a", load_state_dict=None, state_dict=None)
    a.step()
    b = groups.replica("b", load_state_dict=None, state_dict=None)
    assert "register_state_dict_fn" in what_the_joiner_says(groups, a, b)
    said = [r.getMessage() for r in caplog.records if "cannot give its state" in r.getMessage()]
    assert [line.startswith("[a:") and "register_state_dict_fn" in line for line in said] == [True], "once"


def test_over_a_process_group_the_joiner_is_told_why_there_is_no_state_and_does_not_wait(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no error aborts what others wait for. The steps that fail for it do not follow each other at once."""
    monkeypatch.setattr("torchft.checkpointing.pg_transport._REFUSAL", 30.0)
    moments: list[float] = []
    moment = HealPause.moment

    def told_moment(pause: HealPause) -> float:
        moments.append(moment(pause))
        return moments[-1]

    monkeypatch.setattr(HealPause, "moment", told_moment)

    def broken() -> Any:
        raise OSError("the sampler's file is gone")

    def replica(name: str) -> Replica:
        pg = ProcessGroupGloo(timeout=TIMEOUT)
        transport: PGTransport[Any] = PGTransport(pg, TIMEOUT, torch.device("cpu"))
        r = groups.replica(name, pg=pg, checkpoint_transport=transport, proactive_recovery=False)
        r.manager.register_state_dict_fn("sampler", lambda s: None, broken)
        return r

    a = replica("a")
    a.step()
    b = replica("b")

    told: list[str] = []

    def train(r: Replica) -> None:
        while not told:
            r.step()
            if isinstance(why := r.manager.errored(), StepNotServed):
                told.append(str(why))
        r.manager.leave("the test has seen enough")

    groups.together(lambda: train(a), lambda: train(b))
    assert "could not offer it: the state dict function 'sampler' raised OSError: the sampler's file is gone" in told[0]
    assert moments
    assert 0 < moments[0] <= 0.05


def test_groups_that_register_different_state_say_so(groups: Groups) -> None:
    a = groups.replica("a")
    a.step()
    b = groups.replica("b")
    b.manager.register_state_dict_fn("extra", lambda s: None, lambda: {"x": 1})
    assert "['default', 'extra']" in what_the_joiner_says(groups, a, b)


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


def test_what_each_group_has_for_itself_is_healed_from_one_and_nobody_is_called_corrupt(
    groups: Groups, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, Any] = {}
    replicas = [groups.replica(name) for name in ("a", "b", "c")]
    for r, own in zip(replicas, ("of a", "of b", "of c"), strict=True):
        load = seen.update if own == "of c" else lambda state: None
        r.manager.register_state_dict_fn("inner", load, lambda own=own: {"moments": own}, alike=False)
    a, b, c = replicas
    groups.train_together((a.manager, a.step), (b.manager, b.step))
    with caplog.at_level("INFO"):
        groups.train_together(*((r.manager, r.step) for r in replicas), groups=3)
    assert seen["moments"] in ("of a", "of b")
    assert a.weights() == b.weights() == c.weights()
    assert "received step" in caplog.text
    assert "silent corruption" not in caplog.text
    assert "further sources were compared" not in caplog.text


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
