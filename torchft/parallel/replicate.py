"""One call that makes a model of a replica group one of many replicas.

What inside the group is FSDP's or tensor parallelism's stays theirs; the gradients that come out of it are averaged
over the groups that take part in the step (docs/parallelism.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from torchft.manager import Manager
from torchft.parallel.fsdp import (
    average_after_reduce_scatter,
    fsdp_modules,
    fsdp_parameters,
    refuse_within_a_pass,
)
from torchft.parallel.gradients import GradientAverages

__all__ = ["Replicated", "replicate"]


class Replicated:
    """What :func:`replicate` has set up on a model."""

    def __init__(self, modules: list[Any], averages: GradientAverages, guards: list[RemovableHandle]) -> None:
        self._modules = modules
        self._averages = averages
        self._guards = guards

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate gradients: nothing is sent, neither in the group nor across.

        For all micro-batches of a step but the last. FSDP then keeps whole gradients; to keep only shards of them
        (reduce-scatter in the group, no allreduce across), call the model's ``set_requires_all_reduce(False)``.
        """
        self._set(False)
        try:
            yield
        finally:
            self._set(True)

    def _set(self, sync: bool) -> None:
        self._averages.enabled = sync
        for module in self._modules:
            module.set_requires_gradient_sync(sync, recurse=False)

    def remove(self) -> None:
        """Takes the hooks on plain and tensor parallel parameters off again. FSDP's can only be replaced."""
        for handle in [*self._averages.handles, *self._guards]:
            handle.remove()


def replicate(
    model: nn.Module,
    manager: Manager,
    *,
    should_quantize: bool = False,
    end_with_group: timedelta | None = timedelta(seconds=10),
) -> Replicated:
    """Averages the model's gradients over the replica groups that take part in each step.

    Gradients are averaged when ``backward()`` returns. A failure on the way never raises there: it is the
    Manager's error of the step, which is then not committed.

    Args:
        model: in its final form: ``fully_shard``, ``parallelize_module`` and ``model.to()`` have been applied. What
            is sharded by FSDP2 is averaged after FSDP's own reduction inside the group; all other parameters, plain
            ones and DTensors, each for itself on this rank's part: how the ranks of the group agree on those is
            the model's own matter.
        manager: of this rank.
        should_quantize: send one byte an element between the groups (:mod:`torchft.collectives`).
        end_with_group: see :meth:`torchft.manager.Manager.end_with_group`; None: do not call it.

    Returns:
        A handle for gradient accumulation; it may be dropped.

    Raises:
        TypeError: the model is wrapped in torch's DistributedDataParallel, or FSDP1: they average on their own.
        ValueError: nothing in it requires a gradient.
        RuntimeError: this torch is too old for HSDP.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                "the model is wrapped in torch's DistributedDataParallel, which reduces gradients by itself: use "
                "torchft.DistributedDataParallel(manager, module, process_group=group) instead"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError("the model is wrapped in FSDP1, which has no hook for replicas: use fully_shard (FSDP2)")
    modules = fsdp_modules(model)
    sharded = {id(p) for module in modules for p in fsdp_parameters(module)}
    others = [p for p in model.parameters() if id(p) not in sharded]
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to average")
    average_after_reduce_scatter(manager, modules, should_quantize)
    averages = GradientAverages(manager, others, should_quantize)
    guards = refuse_within_a_pass(model) if modules else []
    if end_with_group is not None:
        manager.end_with_group(end_with_group)
    return Replicated(modules, averages, guards)
