"""FSDP2 inside a group, replicas across: hybrid sharded data parallelism whose replicas come and go.

The idea
    FSDP2 averages a module's gradients over the ranks of the group (reduce-scatter) and then calls its *all-reduce
    hook* with what this rank keeps of them. The hook averages that over the groups, so the result is that of one
    HSDP job over all of them. It is the same rank of each group that holds the same shard.

Rules
    - The hook never raises for a failure of communication: that is the Manager's error of the step.
    - With ``set_requires_all_reduce(False)`` the hook keeps what it is given, as FSDP's own HSDP does, and averages
      the sum in the first backward pass that requires it again.
    - ``model.state_dict()`` swaps whole parameters for shards. It is refused where a pass would then compute with
      parameters that changed under its hands.

What FSDP does not tell by public names is asked for in this file alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed import ReduceOp, Work
from torch.utils.hooks import RemovableHandle

__all__ = ["Averages", "average_after_reduce_scatter", "fsdp_modules", "fsdp_parameters", "refuse_within_a_pass"]


class Averages(Protocol):
    """What of a Manager is used here."""

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Work: ...


class _ParameterGroup(Protocol):
    """What of torch's ``FSDPParamGroup`` is used here."""

    fsdp_params: list[Any]
    all_reduce_grads: bool


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules in ``model`` that ``fully_shard`` was applied to.

    Raises:
        RuntimeError: there are some, and this torch cannot call a hook of ours.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None:  # nobody has imported it: nothing is sharded, and its import takes a second
        return []
    found = [module for module in model.modules() if isinstance(module, kind)]
    if found and not hasattr(kind, "set_all_reduce_hook"):
        raise RuntimeError(
            f"HSDP needs FSDPModule.set_all_reduce_hook, which torch {torch.__version__} does not have: install a "
            f"newer one (2.13 has it)"
        )
    return found


def fsdp_parameters(module: Any) -> Iterator[torch.Tensor]:
    """The parameters that FSDP has made shards of in this module, those of modules inside it excluded."""
    for group in _parameter_groups(module):
        for parameter in group.fsdp_params:
            yield parameter.sharded_param


def average_after_reduce_scatter(manager: Averages, modules: list[Any], should_quantize: bool) -> None:
    """Sets the hook of all modules.

    Args:
        manager: averages over the groups.
        modules: of :func:`fsdp_modules`.
        should_quantize: as of the Manager's ``allreduce``.

    Raises:
        ValueError: a module has parameters on several meshes, for which FSDP has no hook.
    """
    for module in modules:
        groups = _parameter_groups(module)
        if groups:  # modules that were sharded together share one: each sets the same
            module.set_all_reduce_hook(_Hook(manager, groups[0], should_quantize))


def refuse_within_a_pass(module: nn.Module) -> list[RemovableHandle]:
    """Makes ``module.state_dict()`` an error within a forward or backward pass, and on another thread than theirs.

    Returns:
        What removes it again.
    """
    computing: list[int] = []

    def forward(*_: object) -> None:
        computing[:] = [threading.get_ident()]

    def state_dict(*_: object) -> None:
        if computing and threading.get_ident() not in computing:
            raise RuntimeError(
                "state_dict() of an FSDP model was called on another thread than its forward pass, which may be "
                "running: it would swap the parameters under it. Pass the Manager the functions of "
                "torchft.parallel.LiveState(model, optimizer) instead"
            )
        if any(_within_a_pass(group) for m in fsdp_modules(module) for group in _parameter_groups(m)):
            raise RuntimeError(
                "state_dict() of an FSDP model was called in the middle of its forward or backward pass: it would swap "
                "the parameters under it. Where a state dict function is registered with on_training_thread=True, call "
                "manager.wait_quorum() before the forward pass"
            )

    return [module.register_forward_pre_hook(forward), module.register_state_dict_pre_hook(state_dict)]  # type: ignore[no-untyped-call]


def _within_a_pass(group: Any) -> bool:
    return getattr(getattr(group, "_training_state", None), "name", "IDLE") != "IDLE"


class _Hook:
    """See the module.

    Args:
        group: the parameters that FSDP reduces at a time.
    """

    def __init__(self, manager: Averages, group: _ParameterGroup, should_quantize: bool) -> None:
        self._manager = manager
        self._group = group
        self._quantize = should_quantize
        self._kept: torch.Tensor | None = None

    def __call__(self, reduced: torch.Tensor) -> None:
        """Replaces what was reduced inside the group by its average over the groups."""
        if reduced.device.type != "cpu":
            # It was made on another stream, whose next tensor must not take its place while this one is in use.
            reduced.record_stream(torch.accelerator.current_stream(reduced.device))
        if self._kept is not None:
            reduced += self._kept
            self._kept = None
        if not self._group.all_reduce_grads:
            self._kept = reduced.clone()
            reduced.zero_()  # FSDP adds it to the gradients
            return
        self._manager.allreduce(reduced, should_quantize=self._quantize).wait()


def _parameter_groups(module: Any) -> list[_ParameterGroup]:
    state = module._get_fsdp_state()
    groups: list[_ParameterGroup] | None = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.11: one or none
        one = getattr(state, "_fsdp_param_group", None)
        groups = [] if one is None else [one]
    return groups
