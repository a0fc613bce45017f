from __future__ import annotations

from typing import Any

import pytest

from torchft.state import ReplicaState, StateError
from torchft.training_thread import directly


def registered(loaded: dict[str, Any]) -> ReplicaState:
    state = ReplicaState()
    state.register("default", lambda s: loaded.update(s), lambda: {"w": 1})
    return state


def test_a_received_state_is_applied_once_and_whole() -> None:
    loaded: dict[str, Any] = {}
    state = registered(loaded)
    state.begin_receiving(in_place=True)
    assert not state.usable
    assert state.received({"user": {"default": {"w": 2}}, "torchft": {"step": 5}}) == {"step": 5}
    assert state.pending
    assert not state.usable
    state.apply()
    assert loaded == {"w": 2}
    assert state.usable
    assert not state.pending


def test_a_transfer_that_does_not_write_in_place_leaves_the_old_state_usable() -> None:
    state = registered({})
    state.begin_receiving(in_place=False)
    assert state.usable


def test_a_load_function_that_fails_leaves_the_state_unusable() -> None:
    def fail(_: object) -> None:
        raise ValueError("cannot load")

    state = ReplicaState()
    state.register("default", fail, dict)
    state.received({"user": {"default": {}}, "torchft": {}})
    with pytest.raises(ValueError, match="cannot load"):
        state.apply()
    assert not state.usable


@pytest.mark.parametrize("garbage", [None, [], {}, {"user": {}}, "state", {"user": {"default": 1}, "torchft": 3}])
def test_what_is_no_state_is_refused(garbage: object) -> None:
    with pytest.raises(StateError):
        registered({}).received(garbage)


def test_a_state_of_another_step_is_refused_and_does_not_wait_to_be_applied() -> None:
    state = registered({})
    arrived = {"user": {"default": {"w": 2}}, "torchft": {"step": 5}}
    with pytest.raises(StateError, match="its state of step 5, the quorum is at 6"):
        state.received(arrived, step=6)
    assert not state.pending
    state.received(arrived, step=5)
    assert state.pending


def test_on_the_training_thread_a_closed_gate_keeps_nobody_out() -> None:
    state = registered({})
    state.gate.close(1.0)
    with pytest.raises(TimeoutError):
        state.read({}, 0.01)
    assert state.read({}, 0.01, directly)["user"] == {"default": {"w": 1}}


def test_pieces_for_the_training_thread_are_left_out_where_nobody_can_ask_it() -> None:
    state = registered({})
    state.register("gathered", lambda s: None, lambda: {"all": 2}, on_training_thread=True)
    assert state.read({}, 1.0)["user"] == {"default": {"w": 1}}
    assert state.read({}, 1.0, directly)["user"] == {"default": {"w": 1}, "gathered": {"all": 2}}
