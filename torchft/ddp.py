"""torch's DistributedDataParallel whose gradients are averaged by a Manager.

torch DDP computes inside a group of one (a dummy process group); each bucket's gradients go through
``manager.allreduce``, which never fails. So a group that dies in the middle of ``backward()`` costs the step and
nothing else: the reducer sees every bucket complete and is as good as new.

What must be the same on all groups, because groups join at any time:
    - *The buckets.* torch rebuilds them after the first backward, in the order in which gradients came; a group
      that joins later would have others. With ``find_unused_parameters=True`` torch never does: it is always on.
    - *The parameters.* A parameter that this group's batch did not use, but another's did, gets the average all the
      same. One that nobody used gets a gradient of zeros, where torch DDP would leave it at None.

Buffers (BatchNorm's running statistics) are each group's own: they come along in a heal, then follow the group's
own data. Use GroupNorm or LayerNorm, or SyncBatchNorm, where replicas must stay identical to the last bit.
"""

# No "from __future__ import annotations": torch compares a hook's annotations with the types themselves.
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import AllreduceOptions, Work
from torch.futures import Future

from torchft.manager import Manager
from torchft.process_group import ProcessGroupDummy, Reduction

__all__ = ["DistributedDataParallel", "PureDistributedDataParallel"]


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch DDP over the replica groups of a Manager.

    Args:
        manager: of this rank.
        module: on its device already.
        **kwargs: as of torch's DistributedDataParallel, but for ``process_group``.

    Raises:
        ValueError: ``process_group`` or ``static_graph=True`` is given.
    """

    def __init__(self, manager: Manager, module: nn.Module, **kwargs: Any) -> None:
        if kwargs.pop("process_group", None) is not None:
            raise ValueError("process_group cannot be chosen: gradients go through the manager's")
        if kwargs.pop("static_graph", False):
            raise ValueError("static_graph=True rebuilds the buckets: groups that join later would have others")
        kwargs["find_unused_parameters"] = True
        super().__init__(module, process_group=_SingleGroup(0, 1), **kwargs)
        self.register_comm_hook(manager, _average_bucket)


def _average_bucket(
    manager: Manager,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = manager.allreduce(bucket.buffer()).get_future()
    return future


class _SingleGroup(ProcessGroupDummy):
    """The process group that torch DDP sees: a group of one, for which every parameter counts as used.

    With ``find_unused_parameters`` the reducer sums a map of the parameters that were used over this group and
    leaves the gradients of the others alone. Whether another group used them is not known here; if it did, leaving
    them alone would let the replicas come apart.
    """

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | Reduction | None = None) -> Work:
        for tensor in tensors:
            if tensor.dtype == torch.int32:
                tensor.fill_(1)
        return super().allreduce(tensors, opts)


class PureDistributedDataParallel(nn.Module):
    """Averages each parameter's gradient on its own, as soon as it is there, with plain autograd hooks.

    Simpler than buckets and with more, smaller collectives. The gradients are averaged when the optimizer's
    ``step`` has waited for them, not when ``backward()`` returns. Every group must use the same parameters.

    Args:
        manager: of this rank.
        module: on its device already.
    """

    def __init__(self, manager: Manager, module: nn.Module) -> None:
        super().__init__()
        self.module = module

        def average(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            manager.allreduce(parameter.grad)

        self._hooks = [
            p.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
            for p in module.parameters()
            if p.requires_grad
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
