"""DTensors in a manifest: the device mesh and the placements, written and read without pickle.

A mesh travels as ``{"device": type, "shape": […], "ranks": […], "names": […] | null}``, a placement as ``["R"]``,
``["S", dim]``, ``["SS", dim, split_factor]`` or ``["P", reduce_op]``. Source and receiver are the same group rank of
two replica groups, so the ranks of a mesh mean the same on both.

On arrival a DTensor gets the mesh of the receiver's own DTensors where one is equal, which has its process groups;
otherwise a mesh without process groups, good for reading the local tensor, not for collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchft.checkpointing.transport import CheckpointError, ManifestError, UnsafeStateError

if TYPE_CHECKING:  # here only: see torchft.dtensor
    from torch.distributed.tensor import Placement

__all__ = ["MeshSpec", "parse_placements", "placements_json"]

_REDUCE_OPS = ("sum", "avg", "product", "max", "min", "norm", "premulsum", "band", "bor", "bxor")
_MAX_RANKS = 1 << 20


@dataclass(frozen=True, slots=True)
class MeshSpec:
    """A device mesh as a value."""

    device: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    """Row-major."""
    names: tuple[str, ...] | None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> MeshSpec:
        names = mesh.mesh_dim_names
        ranks = mesh.mesh.reshape(-1).tolist()
        return cls(mesh.device_type, tuple(mesh.mesh.shape), tuple(ranks), tuple(names) if names else None)

    def json(self) -> dict[str, object]:
        names = list(self.names) if self.names else None
        return {"device": self.device, "shape": list(self.shape), "ranks": list(self.ranks), "names": names}

    @classmethod
    def parse(cls, node: object) -> MeshSpec:
        """Reads what :meth:`json` wrote.

        Raises:
            ManifestError: it is something else.
        """
        if not isinstance(node, dict) or set(node) != {"device", "shape", "ranks", "names"}:
            raise ManifestError("a device mesh is malformed")
        device, shape, ranks, names = node["device"], node["shape"], node["ranks"], node["names"]
        if not (
            isinstance(device, str)
            and device.isascii()
            and device.isalnum()
            and len(device) < 32
            and _counts(shape, 1, 16)
            and _counts(ranks, 0, _MAX_RANKS)
            and math.prod(shape) == len(ranks)
            and (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)))
            and (names is None or len(names) == len(shape))
        ):
            raise ManifestError("a device mesh is malformed")
        return cls(device, tuple(shape), tuple(ranks), None if names is None else tuple(names))

    def build(self) -> DeviceMesh:
        """A mesh without process groups.

        Raises:
            CheckpointError: torch cannot make it here.
        """
        try:
            me = dist.get_rank() if dist.is_initialized() else self.ranks[0]
            ranks = torch.tensor(self.ranks, dtype=torch.int).reshape(self.shape)
            return DeviceMesh(self.device, ranks, mesh_dim_names=self.names, _init_backend=False, _rank=me)
        except Exception as e:
            raise CheckpointError(
                f"a DTensor arrived on a mesh {self.shape} of {self.device} that cannot be made here ({e}): give "
                "the transport state_dict=, so that it can use your own tensors' mesh"
            ) from e


def _counts(node: object, least: int, most: int) -> bool:
    return (
        isinstance(node, list)
        and 0 < len(node) <= most
        and all(type(n) is int and least <= n < _MAX_RANKS for n in node)
    )


def placements_json(placements: Sequence[Placement], path: str) -> list[list[object]]:
    """The form of a DTensor's placements.

    Raises:
        UnsafeStateError: a placement of a kind that the format does not have.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    out: list[list[object]] = []
    for p in placements:
        if type(p) is Replicate:
            out.append(["R"])
        elif type(p) is Shard:
            out.append(["S", p.dim])
        elif type(p) is _StridedShard:
            out.append(["SS", p.dim, p.split_factor])
        elif type(p) is Partial and p.reduce_op in _REDUCE_OPS:
            out.append(["P", p.reduce_op])
        else:
            raise UnsafeStateError(f"{path} is a DTensor placed as {p}, which cannot be sent")
    return out


def parse_placements(node: object, tensor_dims: int, mesh_dims: int, path: str) -> tuple[Placement, ...]:
    """Reads what :func:`placements_json` wrote, one placement for each dimension of the mesh.

    Raises:
        ManifestError: it is something else.
    """
    if not isinstance(node, list) or len(node) != mesh_dims:
        raise ManifestError(f"{path} does not have one placement for each dimension of its mesh")
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    out: list[Placement] = []
    for p in node:
        match p:
            case ["R"]:
                out.append(Replicate())
            case ["S", int(dim)] if 0 <= dim < tensor_dims:
                out.append(Shard(dim))
            case ["SS", int(dim), int(factor)] if 0 <= dim < tensor_dims and 0 < factor < _MAX_RANKS:
                out.append(_StridedShard(dim, split_factor=factor))
            case ["P", str(op)] if op in _REDUCE_OPS:
                out.append(Partial(op))
            case _:
                raise ManifestError(f"{path} has a placement that this receiver does not know")
    return tuple(out)
