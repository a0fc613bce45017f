"""torch's default process group for the ranks of a replica group, in a group that is restarted.

The idea
    torchrun restarts the ranks of a group and keeps their store: in torch 2.13 the second life finds the addresses
    that the first one published, and whoever reads one before it is written anew waits for a process that is gone. So
    each life publishes under a prefix of its own, as :mod:`torchft.group` does.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from torchft import config

__all__ = ["init_process_group"]


def init_process_group(backend: str, timeout: timedelta = timedelta(minutes=2), **kwargs: Any) -> None:
    """As ``torch.distributed.init_process_group``, under torchrun or with its environment variables.

    Args:
        backend: ``"nccl"``, ``"gloo"`` and so on.
        timeout: of the collectives inside the group. When a rank is lost they must end one day even if nothing else
            ends them (docs/parallelism.md).
        **kwargs: as of torch's, but for ``init_method``, ``store``, ``rank`` and ``world_size``.

    Raises:
        ValueError: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` or ``MASTER_PORT`` is not set.
        RuntimeError: the store or the other ranks were not there within ``timeout``.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    life = PrefixStore(f"torchft/inner/{config.RESTART_COUNT.read()}", store)
    dist.init_process_group(backend, timeout=timeout, store=life, rank=rank, world_size=world_size, **kwargs)
