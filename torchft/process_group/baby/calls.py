"""A collective as a message: which tensors it reads and writes, and everything else of it as plain data.

The idea
    The tensors of one collective lie side by side in one block of memory that both processes have (``memory``). The
    message says where in it each tensor is, in the places where the tensors stand among the arguments. The other side
    puts views of the block there and makes the same call.

Rules
    1. What a collective reads is copied into the block before the call returns; what it writes is copied out of it
       when it has succeeded. One that fails leaves its tensors as they were, and a child never sees memory of ours.
    2. Only what a collective reads is copied in, and only what it writes is copied out.
    3. A tensor whose memory is shared already (``tensor.share_memory_()``) is its own block, and is not copied. It is
       written at once: one that fails may leave it half written.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import ReduceOp

__all__ = ["Plan", "arguments_of", "result_of"]

_ALIGNMENT = 64  # bytes: a cache line, and more than any dtype needs

_READ, _WRITTEN, _BOTH, _PLAIN = 1, 2, 3, 0
_ROLES = {
    "allreduce": (_BOTH, _PLAIN),
    "allreduce_coalesced": (_BOTH, _PLAIN),
    "allgather": (_WRITTEN, _READ, _PLAIN),
    "allgather_into_tensor_coalesced": (_WRITTEN, _READ, _PLAIN),
    "alltoall_base": (_WRITTEN, _READ, _PLAIN, _PLAIN, _PLAIN),
    "barrier": (_PLAIN,),
    "broadcast": (_BOTH, _PLAIN),
    "reduce_scatter": (_WRITTEN, _READ, _PLAIN),
    "reduce_scatter_tensor_coalesced": (_WRITTEN, _READ, _PLAIN),
    "send": (_READ, _PLAIN, _PLAIN),
    "recv": (_WRITTEN, _PLAIN, _PLAIN),
}
_OPTIONS = {
    name: getattr(c10d, name)
    for name in (
        "AllgatherOptions",
        "AllreduceCoalescedOptions",
        "AllreduceOptions",
        "AllToAllOptions",
        "BarrierOptions",
        "BroadcastOptions",
        "ReduceScatterOptions",
    )
}
_REDUCTIONS = {name: getattr(ReduceOp, name) for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")}


class Plan:
    """One collective of ours.

    Args:
        op: name of the method.
        args: its arguments, options included.
        rank: of the caller.
        shared: the number of the block that a tensor in shared memory is in; None: it has to be copied.

    Raises:
        ValueError: an argument cannot be said in a message (a reduction with a factor of its own).
    """

    def __init__(self, op: str, args: tuple[Any, ...], rank: int, shared: Callable[[torch.Tensor], int | None]) -> None:
        self.op = op
        self._shared = shared
        self._kept: list[torch.Tensor] = []  # until it has ended
        self.nbytes = 0
        """Of the block."""
        self.devices: set[torch.device] = set()
        self.timeout: timedelta | None = None
        """Of the options, where they have one."""
        self._places: list[tuple[torch.Tensor, int, int]] = []
        roles = _ROLES[op]
        if op == "broadcast":
            roles = (_READ if args[1].rootRank == rank else _WRITTEN, _PLAIN)
        self.arguments = [self._encode(value, role) for value, role in zip(args, roles, strict=True)]
        """For :func:`arguments_of`."""

    @property
    def moves_tensors(self) -> bool:
        """It needs a block."""
        return bool(self._places)

    def copy_in(self, block: torch.Tensor) -> None:
        """Copies what is read into the block, given as bytes."""
        self._copy(block, _READ)

    def copy_out(self, block: torch.Tensor) -> None:
        """Copies what was written out of the block."""
        self._copy(block, _WRITTEN)

    def written(self) -> list[torch.Tensor]:
        """The tensors that :meth:`copy_out` writes."""
        return [tensor for tensor, _, role in self._places if role & _WRITTEN]

    def _copy(self, block: torch.Tensor, role: int) -> None:
        with torch.no_grad():
            for tensor, offset, its_role in self._places:
                if its_role & role:
                    view = _view(block, offset, tensor.dtype, tensor.shape)
                    view.copy_(tensor) if role == _READ else tensor.copy_(view)

    def _encode(self, value: Any, role: int) -> Any:
        if isinstance(value, torch.Tensor):
            number = self._shared(value) if value.is_contiguous() else None
            if number is not None:
                self._kept.append(value)
                at = value.storage_offset() * value.element_size()
                return {"t": at, "d": str(value.dtype)[6:], "s": list(value.shape), "w": role & _WRITTEN, "b": number}
            offset = self.nbytes
            self.nbytes = -(-(offset + value.numel() * value.element_size()) // _ALIGNMENT) * _ALIGNMENT
            self.devices.add(value.device)
            self._places.append((value, offset, role))
            return {"t": offset, "d": str(value.dtype)[6:], "s": list(value.shape), "w": role & _WRITTEN}
        if isinstance(value, list):
            return [self._encode(item, role) for item in value]
        if isinstance(value, int):
            return value
        return self._encode_options(value)

    def _encode_options(self, options: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if hasattr(options, "reduceOp"):
            fields["reduceOp"] = _name_of(options.reduceOp)
        for name in ("rootRank", "rootTensor"):
            if hasattr(options, name):
                fields[name] = getattr(options, name)
        if options.timeout > timedelta(0):
            self.timeout = options.timeout
            fields["timeout"] = options.timeout.total_seconds()
        return {"o": type(options).__name__, "f": fields}


def _name_of(reduction: Any) -> str:
    for name, known in _REDUCTIONS.items():
        if reduction == known:
            return name
    raise ValueError(f"the reduction {reduction!r} cannot be given to a child process")


def result_of(op: str, args: tuple[Any, ...]) -> Any:
    """The value of the future: the tensors with the outcome."""
    if op == "barrier":
        return []
    return [args[0]] if op == "alltoall_base" else args[0]


def arguments_of(
    encoded: Any,
    block: Callable[[int | None], torch.Tensor],
    use: Callable[[torch.Tensor, bool], torch.Tensor] = lambda view, _: view,
) -> Any:
    """The arguments that a :class:`Plan` encoded, with views of the block in place of the tensors.

    Args:
        encoded: ``Plan.arguments``, or a part of it.
        block: the block of that number, as bytes; None: the collective's own.
        use: given each view and whether it is written; what it returns is used instead.
    """
    if isinstance(encoded, list):
        return [arguments_of(item, block, use) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if "t" in encoded:
        view = _view(block(encoded.get("b")), encoded["t"], getattr(torch, encoded["d"]), encoded["s"])
        return use(view, bool(encoded["w"]))
    options = _OPTIONS[encoded["o"]]()
    for name, value in encoded["f"].items():
        if name == "reduceOp":
            value = _REDUCTIONS[value]
        elif name == "timeout":
            value = timedelta(seconds=value)
        setattr(options, name, value)
    return options


def _view(block: torch.Tensor, offset: int, dtype: torch.dtype, shape: Any) -> torch.Tensor:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return block[offset : offset + size].view(dtype).view(shape)
