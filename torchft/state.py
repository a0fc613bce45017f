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
from typing import Any, cast

from torchft.runtime.gate import Gate

__all__ = ["ReplicaState", "StateError"]


class StateError(RuntimeError):
    """The registered functions and what arrived do not fit together, or there is nothing to give."""


class ReplicaState:
    """The registry of state functions, and the healed state that waits to be applied."""

    def __init__(self) -> None:
        self._functions: dict[str, tuple[Callable[[Any], object], Callable[[], Any]]] = {}
        self._pending: dict[str, Any] | None = None
        self.gate = Gate()
        self.usable = True

    def register(self, key: str, load: Callable[[Any], object], save: Callable[[], Any]) -> None:
        """Registers a piece of the state.

        Raises:
            ValueError: the key is taken.
        """
        if key in self._functions:
            raise ValueError(f"a state dict function is registered under {key!r} already")
        self._functions[key] = (load, save)

    def replace(self, key: str, load: Callable[[Any], object], save: Callable[[], Any]) -> None:
        """Registers a piece of the state, instead of what may be registered under the key."""
        self._functions[key] = (load, save)

    def read(self, torchft: dict[str, int], timeout: float) -> dict[str, Any]:
        """The whole state, as it travels: ``{"user": {key: save()}, "torchft": torchft}``.

        Raises:
            StateError: nothing is registered.
            TimeoutError: reading was not allowed for ``timeout`` seconds.
        """
        if not self._functions:
            raise StateError(
                "a peer needs this replica's state, but none is registered: pass state_dict and "
                "load_state_dict to the Manager, or call manager.register_state_dict_fn(key, load, save)"
            )
        with self.gate.reading(timeout):
            return {"user": {key: save() for key, (_, save) in self._functions.items()}, "torchft": torchft}

    @property
    def pending(self) -> bool:
        """Whether a healed state waits to be applied."""
        return self._pending is not None

    def begin_receiving(self, in_place: bool) -> None:
        """A transfer begins; ``in_place``: it writes into the live state itself."""
        self._pending = None
        if in_place:
            self.usable = False

    def received(self, state: object) -> dict[str, int]:
        """A transfer ended well. Returns the ``torchft`` part; the rest waits for :meth:`apply`.

        Raises:
            StateError: what arrived has another shape, or other keys than are registered here.
        """
        if not isinstance(state, dict) or not {"user", "torchft"} <= state.keys():
            raise StateError(f"what the source sent is not a replica's state: {type(state).__name__}")
        whole = cast("dict[str, Any]", state)
        theirs, ours = set(whole["user"]), set(self._functions)
        if theirs != ours:
            raise StateError(
                f"the source's state has the keys {sorted(theirs)}, registered here are {sorted(ours)}: all groups "
                f"must register the same state dict functions"
            )
        self._pending = whole["user"]
        torchft: dict[str, int] = whole["torchft"]
        return torchft

    def apply(self) -> None:
        """Writes the healed state that waits. On the training thread.

        Raises:
            Exception: what a load function raised. The state is not usable then.
        """
        assert self._pending is not None
        self.usable = False
        pending, self._pending = self._pending, None
        for key, value in pending.items():
            self._functions[key][0](value)
        self.usable = True
