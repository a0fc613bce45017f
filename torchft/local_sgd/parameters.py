"""The parameters that replicas synchronise, and the copy of them that the last synchronisation left.

The idea
    Between two synchronisations each replica walks its own way. What all of them agree on is the copy: it is what a
    failed window goes back to, what a pseudogradient is measured from, and what a joining replica receives.

Invariants
    - The copy is written only by :meth:`save` and by a heal, so it is the same on all replicas, bit by bit.
    - Only parameters that require a gradient when this is built are in it; the order is the module's.
    - Of a DTensor parameter it is the local shard: the same rank of another group holds the same shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchft.dtensor import is_dtensor

__all__ = ["SynchronisedParameters", "as_gradient", "local_shard"]


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's values of a parameter, in its own memory, outside of autograd."""
    with torch.no_grad():
        detached = parameter.detach()
        return detached.to_local() if is_dtensor(detached) else detached


def as_gradient(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """``local`` as what ``parameter.grad`` may be set to."""
    if not is_dtensor(parameter):
        return local
    from torch.distributed.tensor import DTensor  # here only: see torchft.dtensor

    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class SynchronisedParameters:
    """The parameters of one module and the copy of them.

    Args:
        module: on its device, and sharded already where it is to be.
        device: of the copy; None: that of each parameter.
        pin_memory: put a copy on the host, of parameters on an accelerator, into page-locked memory.

    Raises:
        ValueError: there is nothing to synchronise, or a parameter is not of real floating point numbers.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None, pin_memory: bool = False) -> None:
        self.named: list[tuple[str, nn.Parameter]] = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not self.named:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train")
        for name, parameter in self.named:
            if not parameter.is_floating_point():
                raise ValueError(f"parameter {name!r} is of {parameter.dtype}: only real floating point is averaged")
        self._copy = [_empty_copy(local, device, pin_memory) for local in self.local()]
        self.save()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the module."""
        return [p for _, p in self.named]

    @property
    def saved(self) -> list[torch.Tensor]:
        """The copy, in the same order. Not to be written."""
        return self._copy

    def local(self) -> list[torch.Tensor]:
        """The live values, in the same order: writing to them writes to the module."""
        return [local_shard(p) for p in self.parameters]

    def save(self) -> None:
        """The live values become the copy."""
        for copy, local in zip(self._copy, self.local(), strict=True):
            copy.copy_(local)

    def restore(self) -> None:
        """The copy becomes the live values."""
        for copy, local in zip(self._copy, self.local(), strict=True):
            local.copy_(copy)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The copy by name: the tensors themselves, this rank's shards."""
        return {name: copy for (name, _), copy in zip(self.named, self._copy, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Writes the copy; the live values stay as they are until :meth:`restore`.

        Raises:
            ValueError: names or shapes are others than here. Nothing is written then.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(f"the parameters {sorted(state)} do not fit {sorted(mine)}: the models differ")
        for name, copy in mine.items():
            if state[name].shape != copy.shape:
                raise ValueError(f"{name!r} is {tuple(state[name].shape)} in the state, {tuple(copy.shape)} here")
        for name, copy in mine.items():
            copy.copy_(state[name])


def _empty_copy(local: torch.Tensor, device: torch.device | None, pin_memory: bool) -> torch.Tensor:
    target = device or local.device
    pin = pin_memory and target.type == "cpu" and local.device.type != "cpu" and torch.accelerator.is_available()
    return torch.empty(local.shape, dtype=local.dtype, device=target, pin_memory=pin)
