"""Splitting a dataset over replica groups and the ranks inside them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler as TorchDistributedSampler

from torchft import config

__all__ = ["DistributedSampler"]


class DistributedSampler(TorchDistributedSampler[Any]):
    """torch's DistributedSampler over ``num_replica_groups`` groups of ``num_replicas`` ranks.

    Each rank of each group gets its own shard; the global rank is ``group_rank + num_replicas * replica_rank``.
    The shards belong to the configured number of groups: while fewer are there, the shards of the missing are not
    read. So an epoch is not exactly once over the data under faults (docs/architecture.md).

    Args:
        dataset: anything with a length.
        replica_rank: this group's number, ``0 … num_replica_groups - 1``.
        num_replica_groups: of the whole job.
        group_rank: this process's rank in its group; by default torch.distributed's, else ``RANK``.
        num_replicas: ranks in a group; by default torch.distributed's world size, else ``WORLD_SIZE``.
        replica_group_id: the older name of ``replica_rank``.
        **kwargs: as of torch's DistributedSampler: ``shuffle``, ``seed``, ``drop_last``.

    Raises:
        ValueError: a rank is out of range, or ``replica_rank`` is given twice or not at all.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        replica_rank: int | None = None,
        num_replica_groups: int | None = None,
        group_rank: int | None = None,
        num_replicas: int | None = None,
        *,
        replica_group_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if (replica_rank is None) == (replica_group_id is None):
            raise ValueError("give replica_rank (or its older name replica_group_id), and only one of them")
        replica_rank = replica_group_id if replica_rank is None else replica_rank
        assert replica_rank is not None
        if num_replica_groups is None:
            raise ValueError("give num_replica_groups, the number of replica groups of the job")
        initialized = dist.is_available() and dist.is_initialized()
        if group_rank is None:
            group_rank = dist.get_rank() if initialized else config.RANK.read()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if initialized else config.WORLD_SIZE.read()
        if not 0 <= replica_rank < num_replica_groups:
            raise ValueError(f"replica_rank {replica_rank} is not below num_replica_groups {num_replica_groups}")
        if not 0 <= group_rank < num_replicas:
            raise ValueError(f"group_rank {group_rank} is not below num_replicas {num_replicas}")
        self.global_rank = group_rank + num_replicas * replica_rank
        self.global_world_size = num_replicas * num_replica_groups
        super().__init__(dataset, num_replicas=self.global_world_size, rank=self.global_rank, **kwargs)
