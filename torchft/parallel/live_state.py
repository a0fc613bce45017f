"""What a healing group receives of a model and its optimizer, read beside the forward pass.

The idea
    The Manager reads the state on a thread of its own while the training thread computes. FSDP's parameters are
    shards between two passes and whole within one, and ``model.state_dict()`` swaps them back: not beside a pass.
    But the shards themselves stay the same tensors all the time. So this takes them once, when they are there, and
    hands out the same tensors whenever it is asked. No collective is needed: each rank gives what it holds, to the
    same rank of another group.

Rules
    - Built, and loaded into, on the training thread between two passes; read from any thread.
    - The tensors handed out are the live ones, so a transport can send them without a copy and receive into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["LiveState", "Stateful"]


class Stateful(Protocol):
    """A scheduler, a data loader, and whatever else has a state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class LiveState:
    """Pass its two methods to the Manager: ``Manager(pg, state.load_state_dict, state.state_dict, …)``.

    Args:
        model: in its final form (sharded, parallelized, on its device). Parameters and persistent buffers.
        optimizer: of its parameters; the inner one, not torchft's wrapper. None: without.
        **others: more of the state, by name. They are read on the Manager's thread, beside the forward pass.

    Raises:
        ValueError: the model has extra state beside tensors, which may not be read beside a forward pass.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, **others: Stateful) -> None:
        self._model = model
        self._optimizer = optimizer
        self._others: Mapping[str, Stateful] = others
        self._tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        extra = sorted(name for name, value in self._tensors.items() if not isinstance(value, torch.Tensor))
        if extra:
            raise ValueError(
                f"{extra} of the model are not tensors (get_extra_state): register them with the Manager by "
                f"functions of your own, which may be called beside the forward pass"
            )

    def state_dict(self) -> dict[str, Any]:
        """``{"model": …, "optimizer": …}`` and the others by name. From any thread, while nobody writes the state."""
        state: dict[str, Any] = {"model": {name: tensor.detach() for name, tensor in self._tensors.items()}}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        return state | {name: other.state_dict() for name, other in self._others.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Writes what :meth:`state_dict` of the same rank of another group returned. On the training thread."""
        self._model.load_state_dict(state["model"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        for name, other in self._others.items():
            other.load_state_dict(state[name])
