"""Averages many tensors over the replica groups, each on its own or packed into buckets.

Each tensor to be averaged is written straight into the memory that is all-reduced, so bucketing costs no further
copy: the averages are views of the buckets. A bucket holds tensors of one dtype and device, in order, up to a number
of bytes; a larger tensor has a bucket of its own.

Every group must come to the same buckets in the same order: they depend on the shapes, dtypes and order of the
tensors, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.distributed import Work

from torchft.manager import Manager

__all__ = ["Averaging", "Fill", "bucket_layout"]

Fill = Callable[[int, torch.Tensor], object]
"""Writes this replica's value of tensor number ``i`` into the memory it is given."""


def bucket_layout(tensors: Sequence[torch.Tensor], cap_bytes: int | None) -> list[list[int]]:
    """Which tensors, by index, are reduced together.

    Args:
        tensors: empty ones are left out.
        cap_bytes: of a bucket; None: each tensor alone.
    """
    buckets: list[list[int]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() == 0:
            continue
        kind = (tensor.dtype, tensor.device)
        bucket, filled = open_buckets.get(kind, ([], 0))
        if cap_bytes is None or not bucket or filled + tensor.nbytes > cap_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(i)
        open_buckets[kind] = (bucket, filled + tensor.nbytes)
    return buckets


class Averaging:
    """One average under way.

    Args:
        manager: in a step whose quorum was started.
        like: tensors of the shapes, dtypes and devices to be averaged.
        fill: this replica's values.
        cap_bytes: as of :func:`bucket_layout`.
        should_quantize: as of :meth:`torchft.manager.Manager.allreduce`.
    """

    def __init__(
        self,
        manager: Manager,
        like: Sequence[torch.Tensor],
        fill: Fill,
        cap_bytes: int | None = None,
        should_quantize: bool = False,
    ) -> None:
        views: dict[int, torch.Tensor] = {}
        self._works: list[Work] = []
        self.nbytes = 0
        """Handed to the all-reduce, before any quantization."""
        for bucket in bucket_layout(like, cap_bytes):
            sizes = [like[i].numel() for i in bucket]
            flat = torch.empty(sum(sizes), dtype=like[bucket[0]].dtype, device=like[bucket[0]].device)
            for i, piece in zip(bucket, torch.split(flat, sizes), strict=True):
                views[i] = piece.view(like[i].shape)
                fill(i, views[i])
            # A bucket starts as soon as it is full: the next one is packed meanwhile.
            self._works.append(manager.allreduce(flat, should_quantize=should_quantize))
            self.nbytes += flat.nbytes
        self._views = [views[i] if i in views else torch.empty_like(t) for i, t in enumerate(like)]

    def wait(self) -> list[torch.Tensor]:
        """The averages; of no meaning where the step is not committed."""
        for work in self._works:
            work.wait()
        return self._views
