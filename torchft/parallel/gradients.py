"""Averaging over the groups, gradient by gradient, for what FSDP does not take care of: plain parameters, and DTensors.

The idea
    Each gradient is averaged as soon as it is there, beside the rest of the backward pass, and all of them are
    there when ``backward()`` returns. Of a DTensor it is this rank's part: the same rank of another group has the
    same part. A sum that the group still has to build (``Partial``) may be built after the average.

Rules
    - All groups must use the same parameters in each backward pass, in one order, which autograd sees to when the
      models are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from torchft.dtensor import is_dtensor
from torchft.parallel.fsdp import Averages

__all__ = ["GradientAverages", "local_gradient"]


def local_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a gradient, in the gradient's own memory.

    Raises:
        ValueError: it is sparse: ranks and groups have other rows each.
    """
    local = gradient.to_local() if is_dtensor(gradient) else gradient
    if hasattr(local, "wait"):  # the result of a functional collective that runs
        local = local.wait()
    if local.layout != torch.strided:
        raise ValueError("a sparse gradient cannot be averaged over the groups: use dense ones (sparse=False)")
    return local


class GradientAverages:
    """Hooks on parameters.

    Args:
        manager: averages over the groups.
        parameters: those of them that require a gradient are averaged.
        should_quantize: as of the Manager's ``allreduce``.
    """

    def __init__(self, manager: Averages, parameters: Iterable[torch.Tensor], should_quantize: bool = False) -> None:
        self._manager = manager
        self._quantize = should_quantize
        self.enabled = True
        """False: gradients are only accumulated."""
        self.handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._average)  # type: ignore[no-untyped-call]
            for p in parameters
            if p.requires_grad
        ]

    def _average(self, parameter: torch.Tensor) -> None:
        if not self.enabled:
            return
        assert parameter.grad is not None
        work = self._manager.allreduce(local_gradient(parameter.grad), should_quantize=self._quantize)
        engine: Any = Variable._execution_engine
        engine.queue_callback(work.wait)  # called at the end of this backward pass, on the stream that called it
