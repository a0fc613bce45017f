"""A checkpoint read by torch's distributed checkpoint (DCP): shards of one layout into shards of another.

The idea
    DCP plans which piece of which saved shard goes where (``torch.distributed.checkpoint``). It knows how a storage is
    read through a ``StorageReader``; this one describes our folders to it. So a group may come back with another
    number of ranks, and any program can load a tensor of a checkpoint::

        state = {"user": {"default": {"model": model.state_dict()}}}
        torch.distributed.checkpoint.load(state, storage_reader=CheckpointReader(folder))

    Nothing is unpickled, unlike with DCP's own files, and no collective is run.

Names
    A tensor at ``state['user']['default']['model']['0.weight']`` is ``user.default.model.0.weight``, as DCP flattens
    such a tree. A tensor that is no DTensor may differ from rank to rank: rank 0's has this name, rank R's ``…@R``.
    Where two would have one name (keys ``1`` and ``"1"``, or with dots in them) each has its path as name.
    A DTensor of partial sums has none: they cannot be put together without the collective that they wait for.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor
from torch.futures import Future

from torchft.checkpointing.directory import Marker, check_files, read_marker
from torchft.checkpointing.manifest import Manifest, TensorSpec
from torchft.checkpointing.mesh import MeshSpec
from torchft.checkpointing.shard import file_names, read_index, read_shard_manifest
from torchft.checkpointing.transport import CheckpointError
from torchft.checkpointing.tree import tensors_by_path

__all__ = ["CheckpointReader", "load_resharded"]

_KEY = re.compile(r"\[('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d+)\]|\.(\w+)")

_OF_A_RANK = re.compile(r"@\d+$")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one rank's piece of a tensor is."""

    rank: int
    at: int
    """Byte in the rank's data file of the first element."""
    spec: TensorSpec


def _name(path: str) -> str:
    """The name by which DCP knows the tensor at a path."""
    keys = [ast.literal_eval(m[1]) if m[1] else m[2] for m in _KEY.finditer(path)]
    return ".".join(str(key) for key in keys) or path


def _names(paths: set[str]) -> dict[str, str]:
    """A name for each path, which no other has."""
    names = {path: _name(path) for path in paths}
    times = Counter(names.values())
    return {path: path if times[name] > 1 or _OF_A_RANK.search(name) else name for path, name in names.items()}


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*raw)


def _two_tensors(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is one tensor on the mesh of some ranks and another one on that of others, as with stages of a "
        "pipeline: a group of another size cannot tell which it is to take. Start it with as many ranks as have saved, "
        "or give the stages' tensors names of their own"
    )


def _is_partial(spec: TensorSpec) -> bool:
    return spec.dtensor is not None and any(p.is_partial() for p in spec.dtensor.placements)


class CheckpointReader(StorageReader):
    """Reads a checkpoint that :class:`torchft.checkpointing.Checkpoints` or ``save`` wrote.

    Args:
        folder: of one checkpoint, ``…/step-000000000500``.

    Files are checked against the checkpoint's marker before they are used; what is wrong raises
    :class:`torchft.checkpointing.DamagedCheckpoint`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.reset(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
            self._folder = Path(checkpoint_id)
        self._places: dict[MetadataIndex, _Place] = {}
        self._others: dict[MetadataIndex, list[_Place]] = {}
        self._names: dict[str, str] = {}
        self._checked: set[str] = set()

    @property
    def marker(self) -> Marker:
        return read_marker(self._folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        marker = self.marker
        described: dict[str, TensorStorageMetadata] = {}
        manifests: list[Manifest] = []
        for rank in range(marker.world_size):
            check_files(self._folder, marker, list(file_names(rank)[1:]))
            manifests.append(read_shard_manifest(self._folder, rank, marker.step))
        self._places, self._others = {}, {}
        self._names = _names({spec.path for manifest in manifests for spec in manifest.tensors})
        for rank, manifest in enumerate(manifests):
            chunks = read_index(self._folder, rank).chunks
            starts = manifest.starts
            for spec in manifest.tensors:
                if _is_partial(spec):
                    continue
                name = self.name_of(spec, rank)
                offsets = torch.Size(chunks.get(spec.path, [0] * len(spec.shape)))
                size = spec.shape if spec.dtensor is None else spec.dtensor.shape
                entry = described.setdefault(
                    name, TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(size), [])
                )
                if entry.size != torch.Size(size):
                    raise _two_tensors(spec.path)
                index = MetadataIndex(name, offsets)
                place = _Place(rank, 0 if spec.extent < 0 else starts[spec.extent] + spec.offset, spec)
                first = self._places.setdefault(index, place)
                if first is place:
                    entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(spec.shape)))
                elif spec.dtensor != first.spec.dtensor:  # else replicas of a shard: they are alike
                    self._others.setdefault(index, []).append(place)
        return Metadata(state_dict_metadata=dict(described))

    def name_of(self, spec: TensorSpec, rank: int) -> str:
        """How a rank's tensor is named."""
        if not self._names:
            self.read_metadata()
        name = self._names[spec.path]
        return name if spec.dtensor is not None or rank == 0 else f"{name}@{rank}"

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not self._places:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            piece = self._read_only_one(item.storage_index)
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_only_one(self, index: MetadataIndex) -> torch.Tensor:
        """A piece of the tensor of that name.

        Raises:
            CheckpointError: on another mesh that name is another tensor's.
        """
        piece = self._read(self._places[index])
        for other in self._others.get(index, ()):
            same = self._read(other)
            if same.dtype != piece.dtype or same.shape != piece.shape or not _equal_bits(same, piece):
                raise _two_tensors(other.spec.path)
        return piece

    def _read(self, place: _Place) -> torch.Tensor:
        name = file_names(place.rank)[0]
        if name not in self._checked:
            check_files(self._folder, self.marker, [name])
            self._checked.add(name)
        spec = place.spec
        reach = 0 if not spec.nbytes else 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))
        length = spec.nbytes if spec.packed else reach * spec.dtype.itemsize
        piece = torch.empty(length, dtype=torch.uint8)
        with (self._folder / name).open("rb") as f:
            f.seek(place.at)
            if f.readinto(memoryview(piece.numpy())) != length:  # type: ignore[arg-type]
                raise CheckpointError(f"{self._folder / name} ends before byte {place.at + length}")
        elements = piece.view(spec.dtype)
        return elements.view(spec.shape) if spec.packed else elements.as_strided(spec.shape, spec.stride)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def load_resharded(folder: Path, rank: int, into: object | None, allow_pickle: bool = False) -> object:
    """A rank's state from a checkpoint whose group had another number of ranks.

    DTensors are put together from all shards. Everything else is that of rank ``rank`` modulo the saved ranks.

    Args:
        folder: of the checkpoint.
        rank: in the group now.
        into: a state with the DTensors of this rank: their meshes are used, and they are read into where they match.

    Raises:
        CheckpointError: there is a DTensor for which ``into`` has no mesh, or one of partial sums.
        DamagedCheckpoint: a file is not what was written.
    """
    reader = CheckpointReader(folder)
    marker = reader.marker
    source = rank % marker.world_size
    manifest = read_shard_manifest(folder, source, marker.step, allow_pickle)
    given = {} if into is None else dict(tensors_by_path(into))
    meshes = _meshes(manifest, given)
    targets: dict[str, torch.Tensor] = {}
    tensors: list[torch.Tensor] = []
    for spec in manifest.tensors:
        name = reader.name_of(spec, source)
        if _is_partial(spec):
            raise CheckpointError(
                f"{spec.path} is a DTensor of partial sums, which a group of another size cannot put together: reduce "
                "it before it is saved (redistribute)"
            )
        if name not in targets:
            targets[name] = _target(spec, given.get(spec.path), meshes)
        tensors.append(targets[name])
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as e:  # a BaseException, and of ours it only has the text
            cause = next(iter(e.failures.values()))[0]
            raise cause if isinstance(cause, CheckpointError) else CheckpointError(f"{folder}: {cause}") from e
    return manifest.build(tensors, allow_pickle)


def _meshes(manifest: Manifest, given: dict[str, torch.Tensor]) -> dict[MeshSpec, DeviceMesh]:
    """Which mesh of this group stands for which of the saved one."""
    meshes: dict[MeshSpec, DeviceMesh] = {}
    for spec in manifest.tensors:
        live = given.get(spec.path)
        if spec.dtensor is not None and isinstance(live, DTensor):
            meshes.setdefault(spec.dtensor.mesh, live.device_mesh)
    return meshes


def _target(spec: TensorSpec, live: torch.Tensor | None, meshes: dict[MeshSpec, DeviceMesh]) -> torch.Tensor:
    if spec.dtensor is None:
        return torch.empty(spec.shape, dtype=spec.dtype)
    shape: Sequence[int] = spec.dtensor.shape
    if isinstance(live, DTensor) and live.dtype == spec.dtype and tuple(live.shape) == tuple(shape):
        return live.detach()
    mesh = meshes.get(spec.dtensor.mesh)
    if mesh is None:
        raise CheckpointError(
            f"{spec.path} was saved as a DTensor on a mesh {spec.dtensor.mesh.shape}; to place it in a group of "
            "another size the live state must have a DTensor on the mesh that takes its place"
        )
    with torch.no_grad():
        return empty_dtensor(*shape, dtype=spec.dtype, device_mesh=mesh, placements=spec.dtensor.placements)
