"""The source's side of a manifest: where the tensors of a state lie, and how that is told.

The idea
    A receiver can do nothing before it has the manifest, and the bytes are wanted only after it. So describing has two
    parts: the manifest first; the tensors over the bytes of each extent when they are asked for, while the manifest
    travels and is read. What it takes is a few operations a tensor: there may be many thousands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from torchft.checkpointing.manifest import MAX_MANIFEST_BYTES, Manifest, SpecReader, are_apart, contiguous_stride, span
from torchft.checkpointing.memory import StorageBytes
from torchft.checkpointing.mesh import MeshSpec, placements_json
from torchft.checkpointing.transport import UnsafeStateError
from torchft.checkpointing.tree import JSON, MAX_PATHS, PLAIN, Encoder, dtype_name
from torchft.dtensor import dtensor_class
from torchft.runtime.collection import collection_put_off

if TYPE_CHECKING:  # here only: see torchft.dtensor
    from torch.distributed.tensor import DTensor

__all__ = ["Description", "describe"]


def describe(state: object, allow_pickle: bool = False) -> tuple[Manifest, list[StorageBytes]]:
    """The manifest of a state, and the bytes of each extent.

    Nothing is copied, except tensors that are packed or lazily conjugated.

    Raises:
        UnsafeStateError: the state holds something that the format refuses.
    """
    description = Description(state, allow_pickle)
    return description.manifest, description.extents()


class _Place(NamedTuple):
    """Where the bytes of an extent are."""

    of: _Found
    start: int
    """Bytes into the storage."""
    length: int
    packed: bool


class Description:
    """Of a state as it is now.

    Args:
        state: a tree of tensors and plain values.
        allow_pickle: describe what the format refuses as a pickled object.

    Raises:
        UnsafeStateError: the state holds something that the format refuses.
    """

    @collection_put_off()
    def __init__(self, state: object, allow_pickle: bool = False) -> None:
        collector = _Collector()
        tree = Encoder(collector.encode, allow_pickle).encode(state)
        self._places = collector.lay_out()
        extents = [p.length for p in self._places]
        document = {"extents": extents, "meshes": [m.json() for m in collector.meshes], "tree": tree}
        body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        if len(body) > MAX_MANIFEST_BYTES:
            raise UnsafeStateError(
                f"the state without its tensors takes {len(body)} bytes, more than {MAX_MANIFEST_BYTES}: "
                "hold bulk data in tensors"
            )
        if sum(len(path) for _, path in collector.nodes) > MAX_PATHS:
            raise UnsafeStateError(
                f"the paths of the state's tensors have more than {MAX_PATHS} characters: use shorter keys"
            )
        reader = SpecReader(extents, collector.meshes)
        for node, path in collector.nodes:
            if node[0] == "D" or node[6]:  # not every DTensor or packed tensor can be received
                reader.read(node, path)
        self.manifest = Manifest(body, tree, tuple(extents), tuple(collector.meshes))
        """What a receiver is told."""

    @collection_put_off()
    def extents(self) -> list[StorageBytes]:
        """The bytes of each extent: the state's memory, or a copy if packed."""
        return [_bytes_of(place) for place in self._places]


@dataclass(slots=True, eq=False)
class _Found:
    """A tensor met at the source, before extents are known."""

    tensor: torch.Tensor
    storage: torch.UntypedStorage
    node: list[JSON]
    """Its ``["T", …]``; offset, extent and packed are filled in at the end."""
    start: int
    """Bytes into its storage."""
    stop: int
    extent: int = -1


class _Collector:
    def __init__(self) -> None:
        self.nodes: list[tuple[list[JSON], str]] = []
        """Of each tensor, and its path."""
        self.meshes: list[MeshSpec] = []
        self._found: list[_Found] = []
        self._dtensor = dtensor_class()

    def encode(self, tensor: torch.Tensor, path: str) -> JSON:
        kind = self._dtensor
        plain = kind is None or type(tensor) is torch.Tensor
        if plain or kind not in (type(tensor), type(getattr(tensor, "data", None))):
            node = self._plain(tensor, path)
        else:
            node = self._of_dtensor(tensor, path)
        self.nodes.append((node, path))
        return node

    def _of_dtensor(self, tensor: torch.Tensor, path: str) -> list[JSON]:
        data = cast("DTensor", tensor.detach())
        spec = MeshSpec.of(data.device_mesh)
        if spec not in self.meshes:
            self.meshes.append(spec)
        local = data.to_local()
        local = local.wait() if hasattr(local, "wait") else local
        placements = placements_json(data.placements, path)
        mesh = self.meshes.index(spec)
        return ["D", list(data.shape), list(data.stride()), mesh, placements, self._plain(local, path)]

    def _plain(self, tensor: torch.Tensor, path: str) -> list[JSON]:
        name = dtype_name(tensor.dtype)
        plain = type(tensor) in PLAIN and tensor.layout == torch.strided and not tensor.is_nested
        if not plain or tensor.is_meta or not name:
            raise UnsafeStateError(
                f"{path} holds a tensor that cannot be sent: {type(tensor).__name__}, {tensor.dtype}, "
                f"{tensor.layout}, on {tensor.device}. Dense tensors with memory can be."
            )
        if tensor.is_conj() or tensor.is_neg():
            tensor = _resolved(tensor.detach())
        shape, stride = tuple(tensor.shape), tensor.stride()
        contiguous = stride == contiguous_stride(shape)
        node: list[JSON] = ["T", name, list(shape), None if contiguous else list(stride), 0, -1, False]
        if numel := tensor.numel():
            size = tensor.itemsize
            start = int(tensor.storage_offset()) * size
            stop = start + (numel if contiguous else span(shape, stride)) * size
            storage = tensor.untyped_storage()
            if stop > storage.nbytes():
                raise UnsafeStateError(
                    f"{path} holds a tensor whose memory was freed: it needs {stop} bytes of a storage that has "
                    f"{storage.nbytes()}. Sharding frees what it gathers again: save the shards"
                )
            self._found.append(_Found(tensor, storage, node, start, stop))
        return node

    def lay_out(self) -> list[_Place]:
        """Gives each tensor its extent; returns where the extents are."""
        storages: dict[tuple[torch.device | None, int], list[_Found]] = {}
        for found in self._found:
            device = None if found.tensor.is_cpu else found.tensor.device
            key = device, found.storage.data_ptr()
            if (members := storages.get(key)) is None:
                storages[key] = [found]
            else:
                members.append(found)
        groups: dict[_Found, list[_Found]] = {}
        for members in storages.values():
            if len(members) > 1:
                for group in _overlapping(members):
                    if len(group) > 1:
                        groups.update(dict.fromkeys(group, group))
        places: list[_Place] = []
        for found in self._found:  # extents are numbered in order of first appearance
            if found.extent == -1:
                extent = len(places)
                places.append(_together(groups[found], extent) if found in groups else _alone(found, extent))
        return places


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a lazily conjugated or negated tensor that is not, with the same strides."""
    shape, stride = tensor.shape, tensor.stride()
    if not tensor.numel():
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    covered = tensor.as_strided((span(shape, stride),), (1,))
    return covered.resolve_conj().resolve_neg().as_strided(shape, stride, 0)


def _overlapping(members: list[_Found]) -> list[list[_Found]]:
    groups: list[list[_Found]] = []
    stop = -1
    for found in sorted(members, key=lambda f: (f.start, -f.stop)):
        if found.start < stop:
            groups[-1].append(found)
            stop = max(stop, found.stop)
        else:
            groups.append([found])
            stop = found.stop
    return groups


def _alone(found: _Found, extent: int) -> _Place:
    found.extent = found.node[5] = extent
    length, nbytes = found.stop - found.start, found.tensor.nbytes
    packed = found.node[6] = nbytes < length and are_apart(found.tensor.shape, found.tensor.stride())
    return _Place(found, found.start, nbytes if packed else length, packed)


def _together(group: list[_Found], extent: int) -> _Place:
    start = group[0].start
    if any((f.start - start) % f.tensor.itemsize for f in group):
        start -= start % 16  # views of different element sizes: keep every offset a multiple of its size
    for found in group:
        found.extent = found.node[5] = extent
        found.node[4] = found.start - start
    return _Place(group[0], start, max(f.stop for f in group) - start, False)


def _bytes_of(place: _Place) -> StorageBytes:
    tensor, storage, start = place.of.tensor, place.of.storage, place.start
    if place.packed:
        tensor = tensor.detach().contiguous()
        storage, start = tensor.untyped_storage(), 0
    return StorageBytes(tensor, storage, start, place.length)
