"""The state that a replica would give to a healing one, and the state it has been given.

The idea
    A user registers, by key, how a piece of the state is read and how it is written. A source reads all of them
    into one tree; a healed replica writes them back on the training thread, at a time when nothing else touches
    the model.

Invariants
    - ``usable`` is false from the moment the live state may have been touched by a transfer until all of a healed
      state has been written. While it is, this replica is nobody's source and never counts as up to date.
    - A healed state is written once, whole, or ``usable`` stays false.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torchft.runtime.gate import Gate
from torchft.training_thread import Caller, directly

__all__ = ["ReplicaState", "StateError"]


class StateError(RuntimeError):
    """The registered functions and what arrived do not fit together, or there is nothing to give."""


_CLOSED = 5.0
"""Seconds for which the state may not be read that are waited for at most."""


@dataclass(frozen=True)
class _Functions:
    load: Callable[[Any], object]
    save: Callable[[], Any]
    on_training_thread: bool = False
    alike: bool = True


def _save(key: str, functions: _Functions) -> object:
    try:
        return functions.save()
    except Exception as e:
        raise StateError(f"the state dict function {key!r} raised {type(e).__name__}: {e}{_place_of(e)}") from e


def _place_of(error: Exception) -> str:
    """Where a function that was called raised it."""
    raised = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return f" ({raised.tb_frame.f_code.co_filename}, line {raised.tb_lineno})" if raised is not None else ""


class ReplicaState:
    """The registry of state functions, and the healed state that waits to be applied."""

    def __init__(self) -> None:
        self._functions: dict[str, _Functions] = {}
        self._pending: dict[str, Any] | None = None
        self.gate = Gate()
        self.usable = True

    def register(
        self,
        key: str,
        load: Callable[[Any], object],
        save: Callable[[], Any],
        on_training_thread: bool = False,
        alike: bool = True,
    ) -> None:
        """Registers a piece of the state.

        Args:
            on_training_thread: ``save`` may only be called there: it runs collectives inside the group.
            alike: in all groups, bit by bit, at the same step.

        Raises:
            ValueError: the key is taken.
        """
        if key in self._functions:
            raise ValueError(f"a state dict function is registered under {key!r} already")
        self._functions[key] = _Functions(load, save, on_training_thread, alike)

    def replace(self, key: str, load: Callable[[Any], object], save: Callable[[], Any]) -> None:
        """Registers a piece of the state, instead of what may be registered under the key."""
        self._functions[key] = _Functions(load, save)

    @property
    def on_training_thread(self) -> bool:
        """Whether a function is registered that may only be called there."""
        return any(f.on_training_thread for f in self._functions.values())

    @property
    def alike(self) -> bool:
        """Whether all groups at the same step hold the same, bit by bit."""
        return all(f.alike for f in self._functions.values())

    def read(self, torchft: dict[str, int], timeout: float, caller: Caller | None = None) -> dict[str, Any]:
        """The state, as it travels: ``{"user": {key: save()}, "torchft": torchft}``.

        Args:
            torchft: the manager's own part.
            timeout: seconds until reading must be allowed, and until the training thread must have come.
            caller: calls functions that may only be called on the training thread; None leaves these pieces out.

        Raises:
            StateError: nothing is registered, or a function raised: the message names its key, what, and where.
            TimeoutError: reading was not allowed for 5 s, or a quarter of ``timeout`` where that is shorter: all groups
                stand meanwhile.
        """
        if not self._functions:
            raise StateError(
                "a peer needs this replica's state, but none is registered: pass state_dict and "
                "load_state_dict to the Manager, or call manager.register_state_dict_fn(key, load, save)"
            )
        pieces: dict[str, Any] = {}
        if caller is not None and self.on_training_thread:  # not under the gate: that thread may want to close it
            pieces = caller(
                lambda: {k: _save(k, f) for k, f in self._functions.items() if f.on_training_thread}, timeout
            )
        # On the training thread nobody else writes the state: that thread closed the gate, if it is closed.
        with nullcontext() if caller is directly else self.gate.reading(min(_CLOSED, timeout / 4)):
            pieces |= {k: _save(k, f) for k, f in self._functions.items() if not f.on_training_thread}
        return {"user": {key: pieces[key] for key in self._functions if key in pieces}, "torchft": torchft}

    @property
    def pending(self) -> bool:
        """Whether a healed state waits to be applied."""
        return self._pending is not None

    def begin_receiving(self, in_place: bool) -> None:
        """A transfer begins; ``in_place``: it writes into the live state itself."""
        self._pending = None
        if in_place:
            self.usable = False

    def untouched(self) -> None:
        """A transfer ended before it wrote anything: the live state is what it was."""
        self.usable = True

    def received(self, state: object, step: int | None = None) -> dict[str, int]:
        """A transfer ended well. Returns the ``torchft`` part; the rest waits for :meth:`apply`.

        Args:
            state: what arrived.
            step: that it must be of; None: any.

        Raises:
            StateError: what arrived has another shape, or other keys than are registered here, or is of another step.
                Nothing waits to be applied then.
        """
        if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in ("user", "torchft")):
            raise StateError(f"what the source sent is not a replica's state: {type(state).__name__}")
        whole = cast("dict[str, dict[str, Any]]", state)
        if step is not None and whole["torchft"].get("step") != step:
            raise StateError(
                f"the source sent its state of step {whole['torchft'].get('step')}, the quorum is at {step}"
            )
        theirs, ours = set(whole["user"]), set(self._functions)
        if theirs != ours:
            raise StateError(
                f"the source's state has the keys {sorted(theirs)}, registered here are {sorted(ours)}: all groups "
                f"must register the same state dict functions"
            )
        self._pending = whole["user"]
        torchft: dict[str, int] = whole["torchft"]
        return torchft

    def keep_own(self, state: dict[str, Any]) -> None:
        """This rank heals nothing, but must load when the others of its group do: what it saved itself.

        Args:
            state: as :meth:`read` returned it.
        """
        self._pending = {k: v for k, v in state["user"].items() if self._functions[k].on_training_thread}

    def drop_pending(self) -> None:
        """What waits is not applied; the state is as it was."""
        self._pending = None

    def apply(self) -> None:
        """Writes the healed state that waits. On the training thread.

        Raises:
            Exception: what a load function raised. The state is not usable then.
        """
        assert self._pending is not None
        self.usable = False
        pending, self._pending = self._pending, None
        for key, functions in self._functions.items():  # in this order on all ranks
            if key in pending:
                functions.load(pending[key])
        self.usable = True
