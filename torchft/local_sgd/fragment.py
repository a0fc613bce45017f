"""One piece of the model with its outer optimizer: the arithmetic of DiLoCo, without any timing.

With ``g`` the copy that was last synchronised and ``x`` the live parameters:

    pseudogradient   d = g - x, averaged over the groups
    outer step       g' = OuterOptimizer(g, d)
    mixing           x' = (1 - alpha) * g' + alpha * x

The outer optimizer belongs to the model's own parameters, like any optimizer of torch. So for its step the
parameters hold ``g`` and their gradients hold ``d``; the inner optimizer's gradients are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from torchft.local_sgd.averaging import Averaging
from torchft.local_sgd.parameters import SynchronisedParameters, as_gradient
from torchft.manager import Manager

__all__ = ["Fragment"]


class Fragment:
    """What is synchronised at one time.

    Args:
        module: its parameters that require a gradient.
        outer: holds all of them, perhaps others too, which its steps here leave alone.
        device, pin_memory: of the copy, as of :class:`SynchronisedParameters`.

    Raises:
        ValueError: the outer optimizer lacks a parameter.
    """

    def __init__(self, module: nn.Module, outer: Optimizer, device: torch.device | None, pin_memory: bool) -> None:
        self.parameters = SynchronisedParameters(module, device, pin_memory)
        self.outer = outer
        held = {id(p) for group in outer.param_groups for p in group["params"]}
        if missing := [name for name, p in self.parameters.named if id(p) not in held]:
            raise ValueError(f"the outer optimizer of a fragment does not hold its parameters {missing}")

    def average_pseudogradient(self, manager: Manager, cap_bytes: int | None, should_quantize: bool) -> Averaging:
        """Begins to average it, as it is now: what happens to the live parameters later has no part in it."""
        local, saved = self.parameters.local(), self.parameters.saved
        return Averaging(
            manager, local, lambda i, into: into.copy_(saved[i]).sub_(local[i]), cap_bytes, should_quantize
        )

    def step(self, pseudogradient: Sequence[torch.Tensor], alpha: float) -> None:
        """The outer step; what it gives is the new copy, and mixed with the live parameters their new values.

        Args:
            pseudogradient: averaged, one tensor for each parameter.
            alpha: share of the live parameters, 0 to 1.
        """
        mine = [t.clone() for t in self.parameters.local()] if alpha else None
        self.parameters.restore()
        with _gradients(self.outer, self.parameters.parameters, pseudogradient):
            self.outer.step()
        self.parameters.save()
        if mine is not None:
            for local, before in zip(self.parameters.local(), mine, strict=True):
                local.lerp_(before, alpha)

    def discard(self) -> None:
        """Back to what was last synchronised; the outer optimizer knows nothing of it."""
        self.parameters.restore()


@contextmanager
def _gradients(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Within it exactly ``parameters`` have gradients, as far as ``optimizer`` sees."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad for p in held]
    try:
        for p in held:
            p.grad = None
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = as_gradient(parameter, value)
        yield
    finally:
        for p, grad in zip(held, before, strict=True):
            p.grad = grad
