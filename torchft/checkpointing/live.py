"""The tensors that a receiver has already: what of them may be written as bytes, found out before a state arrives.

A receiver waits for its source to describe the state. What it must know of its own tensors it finds out meanwhile:
where each one's bytes are, so that for the usual state, tensors that each fill a storage of their own, nothing is left
to do but to compare.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch.nn.parameter import is_lazy

from torchft.checkpointing.manifest import span
from torchft.checkpointing.memory import memory_view
from torchft.checkpointing.tree import PLAIN, tensors_by_path
from torchft.dtensor import dtensor_class
from torchft.runtime.collection import collection_put_off
from torchft.runtime.tracebacks import without_frames

if TYPE_CHECKING:  # here only: see torchft.dtensor
    from torch.distributed.tensor import DTensor

__all__ = ["LiveTensor", "LiveTensors", "look_at"]


class LiveTensor(NamedTuple):
    """A tensor of this process, and what is asked about it again and again."""

    given: torch.Tensor
    """As it stands in the tree."""
    dtensor: DTensor | None
    local: torch.Tensor
    """Where its values are: itself, if it is nothing but memory; of a DTensor what this process has of it."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    usable: bool
    """Values may be copied into it."""
    address: int
    """Of its first byte."""
    storage: torch.UntypedStorage | None
    """Where it is. It lives as long as this, so that nothing else gets its address."""
    view: memoryview | None
    """All of its bytes in CPU memory, if each from the first to the last is of exactly one element."""

    @property
    def in_its_place(self) -> bool:
        """Whether what stands in the tree is in the memory that was looked at still (``parameter.data = …``)."""
        now = self.given if self.dtensor is None else cast("DTensor", self.given.detach()).to_local()
        return now.data_ptr() == self.address and now.shape == self.shape and now.stride() == self.stride


class LiveTensors:
    """The tensors of a tree, by path.

    Args:
        tree: values that the format refuses are passed over, and tensors that have no shape (yet).
    """

    @collection_put_off()
    def __init__(self, tree: object = None) -> None:
        kind = dtensor_class()
        self._by_path = {p: _look_at(t, kind) for p, t in tensors_by_path(tree) if not is_lazy(t) and not t.is_nested}

    def get(self, path: str) -> LiveTensor | None:
        """The one at a path."""
        return self._by_path.get(path)

    def dtensors(self) -> list[DTensor]:
        """Those that are shards."""
        return [t.dtensor for t in self._by_path.values() if t.dtensor is not None]


def look_at(state_dict: Callable[[], object] | None) -> Callable[[], LiveTensors]:
    """Looks at what a function gives, now. If it raises, so does the result, when it is called: who waits for a source
    hears the source first. To be called once.

    Args:
        state_dict: returns the tree; None: there is none.
    """
    try:
        live = LiveTensors(None if state_dict is None else state_dict())
    except Exception as e:
        e.add_note("".join(traceback.format_tb(e.__traceback__)[-3:]))
        failure = [without_frames(e, contexts=True)]

        def fail() -> LiveTensors:
            raise failure.pop()  # once: kept here, it would keep this

        return fail
    return lambda: live


def _look_at(given: torch.Tensor, kind: type[DTensor] | None) -> LiveTensor:
    local = given
    dtensor: DTensor | None = None
    if type(given) not in PLAIN:
        local = given.detach()
        if kind is not None and isinstance(local, kind):
            dtensor, local = local, local.to_local()
    usable = type(local) in PLAIN and local.layout == torch.strided and not local.is_meta
    usable = usable and not local.is_conj() and not local.is_neg()
    shape, stride = tuple(local.shape), local.stride() if usable else ()
    storage = view = None
    address = 0
    if usable:
        dense = local.is_contiguous() or _is_dense(shape, stride)
        size = local.itemsize
        storage, start = local.untyped_storage(), int(local.storage_offset()) * size
        reach = local.nbytes if dense else span(shape, stride) * size
        usable = start + reach <= storage.nbytes() or not local.numel()  # sharding frees what it gathers again
        if usable:
            address = local.data_ptr()
            if dense and local.is_cpu:
                view = memory_view(storage, start, reach)
    return LiveTensor(given, dtensor, local, local.dtype, shape, stride, usable, address, storage, view)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether each byte from the first to the last element belongs to exactly one element."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True
