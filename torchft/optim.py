"""The optimizer of a fault-tolerant loop: it begins the step and steps only when the step is committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from torchft.manager import Manager

__all__ = ["OptimizerWrapper"]


class OptimizerWrapper(Optimizer):
    """Wraps an optimizer: :meth:`zero_grad` starts the quorum, :meth:`step` steps if ``should_commit`` says so.

    Args:
        manager: of this rank.
        optim: the optimizer that does the work. Schedulers go on this one.

    Raises:
        TypeError: ``optim`` is such a wrapper already, or no optimizer.
    """

    def __init__(self, manager: Manager, optim: Optimizer) -> None:
        # Not super().__init__(): there is one set of parameter groups and state, the wrapped optimizer's.
        if isinstance(optim, OptimizerWrapper):
            raise TypeError("this optimizer is wrapped already: each step() would vote twice. Pass the one it wraps")
        if not hasattr(optim, "step"):  # some are no subclass of torch's
            raise TypeError(f"optim is a {type(optim).__name__}, not a torch optimizer: Optimizer(manager, optimizer)")
        self.manager = manager
        self.optim = optim

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begins a step: starts the quorum and clears the gradients."""
        self.manager.start_quorum()
        self.optim.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Ends a step: the wrapped optimizer steps if the step is committed.

        Raises:
            ValueError: a closure is given; a step may not evaluate the model twice.
            RuntimeError: as of :meth:`Manager.should_commit`.
        """
        if closure is not None:
            raise ValueError("a closure is not supported: a step computes its gradients once")
        if self.manager.should_commit():
            self.optim.step()
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optim.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optim.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optim.param_groups

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optim.defaults

    def __repr__(self) -> str:
        return f"OptimizerWrapper({self.optim!r})"
