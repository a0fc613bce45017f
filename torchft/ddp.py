"""torch's DistributedDataParallel whose gradients are averaged by a Manager.

torch DDP computes inside a group of one (a dummy process group), or over the ranks of this replica group where it is
given their process group; each bucket's gradients then go through ``manager.allreduce``, which never fails. So a group
that dies in the middle of ``backward()`` costs the step and nothing else: the reducer sees every bucket complete and is
as good as new.

What must be the same on all groups, because groups join at any time:
    - *The buckets.* torch rebuilds them after the first backward, in the order in which gradients came; a group
      that joins later would have others. With ``find_unused_parameters=True`` torch never does: it is always on.
    - *The parameters.* A parameter that this group's batch did not use, but another's did, gets the average all the
      same. One that nobody used gets a gradient of zeros, where torch DDP would leave it at None.

Buffers (BatchNorm's running statistics) are each group's own: they come along in a heal, then follow the group's
own data. Use GroupNorm or LayerNorm, or SyncBatchNorm, where replicas must stay identical to the last bit.
"""

# No "from __future__ import annotations": torch compares a hook's annotations with the types themselves.
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import AllreduceOptions, Work
from torch.futures import Future

from torchft.manager import Manager
from torchft.parallel import replicate
from torchft.process_group import ProcessGroup, ProcessGroupDummy, ProcessGroupWrapper, Reduction
from torchft.work import CompletedWork

__all__ = ["DistributedDataParallel", "PureDistributedDataParallel"]


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch DDP over the replica groups of a Manager.

    Args:
        manager: of this rank.
        module: on its device already.
        process_group: of the ranks of this group, where each has data and a copy of the model of its own, for
            instance ``dist.group.WORLD``: weights and buffers come from its rank 0, gradients are averaged over its
            ranks first. None: each rank is averaged with the same rank of the other groups alone, so that ranks of a
            group may hold different parts of a model; with copies of one model they would come apart.
        **kwargs: as of torch's DistributedDataParallel.

    Raises:
        ValueError: ``static_graph=True`` is given.
    """

    def __init__(
        self, manager: Manager, module: nn.Module, *, process_group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> None:
        if kwargs.pop("static_graph", False):
            raise ValueError("static_graph=True rebuilds the buckets: groups that join later would have others")
        kwargs["find_unused_parameters"] = True
        if process_group is None:
            super().__init__(module, process_group=_SingleGroup(0, 1), **kwargs)
            self.register_comm_hook(manager, _average_bucket)
            return
        super().__init__(module, process_group=_InnerGroup(process_group), **kwargs)
        self.register_comm_hook((manager, process_group), _average_bucket_in_group_first)
        manager.end_with_group()


def _average_bucket(
    manager: Manager,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = manager.allreduce(bucket.buffer()).get_future()
    return future


def _average_bucket_in_group_first(
    state: tuple[Manager, dist.ProcessGroup],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[torch.Tensor]:
    # One after the other and not chained: chained, the buckets of two ranks could go across in different orders.
    manager, group = state
    buffer = bucket.buffer()
    buffer.div_(group.size())
    dist.all_reduce(buffer, group=group)
    return _average_bucket(manager, bucket)


def _count_as_used(tensors: list[torch.Tensor]) -> bool:
    """Whether this is the map of the parameters that were used, which then says that all were.

    With ``find_unused_parameters`` the reducer sums this map over its group and leaves the gradients of the others
    alone. Whether another group used them is not known here; if it did, leaving them alone would let the replicas
    come apart.
    """
    if any(tensor.dtype != torch.int32 for tensor in tensors):
        return False
    for tensor in tensors:
        tensor.fill_(1)
    return True


class _SingleGroup(ProcessGroupDummy):
    """The process group that torch DDP sees: a group of one, for which every parameter counts as used."""

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | Reduction | None = None) -> Work:
        _count_as_used(tensors)
        return super().allreduce(tensors, opts)


class _InnerGroup(ProcessGroupWrapper):
    """The ranks of this group, for which every parameter counts as used."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(cast(ProcessGroup, group))  # it has the same collectives

    def getBackendName(self) -> str:
        return "torchft-inner"  # torch's reducer looks for backends of its own by their names

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | Reduction | None = None) -> Work:
        return CompletedWork(tensors) if _count_as_used(tensors) else super().allreduce(tensors, opts)


class PureDistributedDataParallel(nn.Module):
    """Averages each parameter's gradient on its own, as soon as it is there, with plain autograd hooks.

    Simpler than buckets and with more, smaller collectives (:func:`torchft.parallel.replicate` in the clothes of a
    module). Every group must use the same parameters.

    Args:
        manager: of this rank.
        module: on its device already.
    """

    def __init__(self, manager: Manager, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        replicate(module, manager, end_with_group=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
