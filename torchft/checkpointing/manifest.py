"""The description of a state: its tree, and where each tensor's bytes lie in one long run of bytes.

The idea
    Tensors are views of memory. The *extents* of a state are the runs of memory its tensors cover, merged where they
    overlap, so memory shared by several tensors (tied weights, views of one buffer) is one extent and travels once.
    Laid end to end, in order of first appearance, the extents are the *data* of the state.

Form (JSON, UTF-8, no spaces)
    ``{"extents": [bytes, …], "meshes": [mesh, …], "tree": …}``. A tensor in the tree is
    ``["T", dtype, shape, stride | null, offset, extent, packed]``: ``offset`` in bytes into its extent, ``stride`` in
    elements (null: contiguous), ``extent`` -1 if it has no elements. ``packed``: it is alone in its extent and does not
    fill it, so its elements travel contiguously and get their strides back on arrival. Its position in the tree is
    its path. A DTensor is ``["D", global shape, global stride, mesh, placements, local "T"]``.

Invariants, checked on reading before anything is allocated
    Every tensor lies inside its extent, and its offset is a multiple of its element size. Counts, dimensions and
    sizes are bounded. What is read allocates as many bytes as ``total`` says, and no more; packed tensors that are
    spread out over more memory than they have bytes have a bound of their own.
"""

from __future__ import annotations

import functools
import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from torchft.checkpointing.mesh import MeshSpec, parse_placements, placements_json
from torchft.checkpointing.transport import ManifestError, UnsafeStateError
from torchft.checkpointing.tree import DTYPES, JSON, Decoder, Encoder, dtype_name
from torchft.dtensor import dtensor_class
from torchft.runtime.collection import collection_put_off

if TYPE_CHECKING:  # here only: see torchft.dtensor
    from torch.distributed.tensor import DTensor, Placement

__all__ = ["MAX_MANIFEST_BYTES", "MAX_TOTAL", "DTensorSpec", "Manifest", "TensorSpec", "describe"]

MAX_MANIFEST_BYTES = 256 << 20
MAX_TOTAL = 1 << 50
_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 62
_MAX_SPREAD = 64
"""How much more memory than bytes the packed tensors of a state may take, beyond 1 GiB."""
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True, slots=True)
class DTensorSpec:
    """What a DTensor is beyond its local tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    mesh: MeshSpec
    placements: tuple[Placement, ...]


class TensorSpec(NamedTuple):
    """One tensor of a state. For a DTensor, shape and stride are the local tensor's."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Bytes from the start of the extent."""
    extent: int
    """Index; -1 for a tensor without elements."""
    packed: bool
    dtensor: DTensorSpec | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """A state without its bytes."""

    body: bytes
    """The JSON, as it travels."""
    tree: JSON = field(repr=False)
    extents: tuple[int, ...]
    """Bytes of each."""
    tensors: tuple[TensorSpec, ...] = field(repr=False)
    """In the order of the tree."""

    @property
    def total(self) -> int:
        """Bytes of the data."""
        return sum(self.extents)

    @classmethod
    @collection_put_off()
    def parse(cls, body: bytes | memoryview, allow_pickle: bool = False) -> Manifest:
        """Reads and checks what a source sent.

        Raises:
            ManifestError: it is not a manifest, or not a safe one.
        """
        if len(body) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"a manifest of {len(body)} bytes is more than {MAX_MANIFEST_BYTES}")
        try:
            document = json.loads(bytes(body), parse_constant=_no_constant)
        except (ValueError, RecursionError) as e:
            raise ManifestError(f"the manifest is not JSON: {e}") from e
        if not isinstance(document, dict) or set(document) != {"extents", "meshes", "tree"}:
            raise ManifestError("the manifest does not have exactly extents, meshes and tree")
        extents, meshes = document["extents"], document["meshes"]
        if not isinstance(extents, list) or not all(type(n) is int and 0 < n <= MAX_TOTAL for n in extents):
            raise ManifestError("the manifest's extents are not positive byte counts")
        if sum(extents) > MAX_TOTAL:
            raise ManifestError(f"the manifest announces more than {MAX_TOTAL} bytes")
        if not isinstance(meshes, list) or len(meshes) > 1000:
            raise ManifestError("the manifest's meshes are not a list of at most 1000")
        reader = _SpecReader(extents, [MeshSpec.parse(m) for m in meshes])
        try:
            Decoder(reader.read, allow_pickle, load=False).decode(document["tree"])
        except RecursionError as e:
            raise ManifestError("the manifest's tree is nested too deeply") from e
        if len(reader.used) != len(extents):
            raise ManifestError("the manifest announces bytes that belong to no tensor")
        return cls(bytes(body), document["tree"], tuple(extents), tuple(reader.specs))

    def build(self, tensors: Sequence[torch.Tensor], allow_pickle: bool = False) -> object:
        """The tree with these tensors in it, one for each of ``self.tensors``."""
        position = iter(tensors)
        return Decoder(lambda _node, _path: next(position), allow_pickle).decode(self.tree)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


class _SpecReader:
    """Checks the tensors of a tree that came from the network."""

    def __init__(self, extents: list[int], meshes: list[MeshSpec]) -> None:
        self._extents = extents
        self._meshes = meshes
        self.specs: list[TensorSpec] = []
        self.used: set[int] = set()
        self._spread = 0
        self._packed = 0

    def read(self, node: list[JSON], path: str) -> None:
        spec = self._dtensor(node, path) if node[0] == "D" else self._tensor(node, path, None)
        self.specs.append(spec)

    def _dtensor(self, node: list[JSON], path: str) -> TensorSpec:
        if len(node) != 6 or not isinstance(node[5], list) or not node[5] or node[5][0] != "T":
            raise ManifestError(f"{path} is not a DTensor")
        shape, stride = _shape(node[1], path), _sizes(node[2], path)
        if len(shape) != len(stride) or type(node[3]) is not int or not 0 <= node[3] < len(self._meshes):
            raise ManifestError(f"{path} is not a DTensor: its strides or its mesh do not exist")
        mesh = self._meshes[node[3]]
        placements = parse_placements(node[4], len(shape), len(mesh.shape), path)
        return self._tensor(node[5], path, DTensorSpec(shape, stride, mesh, placements))

    def _tensor(self, node: list[JSON], path: str, dtensor: DTensorSpec | None) -> TensorSpec:
        if len(node) != 7:
            raise ManifestError(f"{path} is not a tensor")
        _, name, raw_shape, raw_stride, offset, extent, packed = node
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise ManifestError(f"{path} has a dtype that this receiver does not know: {reprlib.repr(name)}")
        shape = _shape(raw_shape, path)
        stride = _contiguous_stride(shape) if raw_stride is None else _sizes(raw_stride, path)
        if len(stride) != len(shape) or type(offset) is not int or offset < 0 or type(packed) is not bool:
            raise ManifestError(f"{path} has malformed strides or offset")
        if type(extent) is not int or not -1 <= extent < len(self._extents):
            raise ManifestError(f"{path} lies in an extent that does not exist")
        numel = math.prod(shape)
        if (numel == 0) != (extent == -1):
            raise ManifestError(f"{path} has {numel} elements, which does not fit extent {extent}")
        if numel:
            length = self._extents[extent]
            reach = (numel if raw_stride is None else _span(shape, stride)) * dtype.itemsize
            if packed:
                if extent in self.used or offset or numel * dtype.itemsize != length or reach > MAX_TOTAL:
                    raise ManifestError(f"{path} is packed, but does not fill an extent of its own")
                self._spread += reach
                self._packed += length
                if self._spread > _MAX_SPREAD * self._packed + (1 << 30):
                    raise ManifestError(
                        f"{path} is one of the tensors that would take {self._spread} bytes for {self._packed} bytes "
                        "of elements"
                    )
            elif offset % dtype.itemsize or offset + reach > length:
                raise ManifestError(f"{path} does not lie inside its extent of {length} bytes")
            self.used.add(extent)
        return TensorSpec(path, dtype, shape, stride, offset, extent, packed, dtensor)


def _sizes(node: JSON, path: str) -> tuple[int, ...]:
    good = isinstance(node, list) and len(node) <= _MAX_DIMS
    if good:
        for n in node:
            if type(n) is not int or not 0 <= n <= MAX_TOTAL:
                good = False
    if not good:
        raise ManifestError(f"{path} has a malformed shape or stride")
    return tuple(node)


def _shape(node: JSON, path: str) -> tuple[int, ...]:
    sizes = _sizes(node, path)
    multiplied = [n for n in sizes if n] if 0 in sizes else sizes  # without elements, too: torch multiplies all of them
    if math.prod(multiplied) > _MAX_ELEMENTS:
        raise ManifestError(f"{path} has a shape that no tensor can have")
    return sizes


@functools.lru_cache(maxsize=1024)  # the tensors of a state have few shapes
def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last, both included. Not for a tensor without elements."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


@dataclass(slots=True)
class _Found:
    """A tensor met at the source, before extents are known."""

    tensor: torch.Tensor
    node: list[JSON]
    """Its ``["T", …]``; offset, extent and packed are filled in at the end."""
    start: int
    """Bytes into its storage."""
    stop: int
    extent: int = -1


@collection_put_off()
def describe(state: object, allow_pickle: bool = False) -> tuple[Manifest, list[torch.Tensor]]:
    """The manifest of a state, and the bytes of each extent as a one-dimensional ``uint8`` view of its memory.

    Nothing is copied, except tensors that are packed or lazily conjugated.

    Raises:
        UnsafeStateError: the state holds something that the format refuses.
    """
    collector = _Collector()
    tree = Encoder(collector.encode, allow_pickle).encode(state)
    sources = collector.lay_out()
    extents = [s.numel() for s in sources]
    meshes = [m.json() for m in collector.meshes]
    document = {"extents": extents, "meshes": meshes, "tree": tree}
    body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > MAX_MANIFEST_BYTES:
        raise UnsafeStateError(
            f"the state without its tensors takes {len(body)} bytes, more than {MAX_MANIFEST_BYTES}: "
            "hold bulk data in tensors"
        )
    reader = _SpecReader(extents, collector.meshes)
    for node, path in collector.nodes:
        reader.read(node, path)
    return Manifest(body, tree, tuple(extents), tuple(reader.specs)), sources


class _Collector:
    def __init__(self) -> None:
        self.nodes: list[tuple[list[JSON], str]] = []
        self.meshes: list[MeshSpec] = []
        self._found: list[_Found] = []

    def encode(self, tensor: torch.Tensor, path: str) -> JSON:
        node: list[JSON]
        kind = dtensor_class()
        if kind is not None and kind in (type(tensor), type(getattr(tensor, "data", None))):
            data = cast("DTensor", tensor.detach())
            spec = MeshSpec.of(data.device_mesh)
            if spec not in self.meshes:
                self.meshes.append(spec)
            local = data.to_local()
            local = local.wait() if hasattr(local, "wait") else local
            placements = placements_json(data.placements, path)
            mesh = self.meshes.index(spec)
            node = ["D", list(data.shape), list(data.stride()), mesh, placements, self._plain(local, path)]
        else:
            node = self._plain(tensor, path)
        self.nodes.append((node, path))
        return node

    def _plain(self, tensor: torch.Tensor, path: str) -> list[JSON]:
        name = dtype_name(tensor.dtype)
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.is_meta or not name:
            raise UnsafeStateError(
                f"{path} holds a tensor that cannot be sent: {type(tensor).__name__}, {tensor.dtype}, "
                f"{tensor.layout}, on {tensor.device}. Dense tensors with memory can be."
            )
        data = tensor.detach()
        if data.is_conj() or data.is_neg():
            data = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=data.device).copy_(data)
        shape, stride = tuple(data.shape), data.stride()
        contiguous = stride == _contiguous_stride(shape)
        node: list[JSON] = ["T", name, list(shape), None if contiguous else list(stride), 0, -1, False]
        if numel := data.numel():
            start = int(data.storage_offset()) * data.itemsize
            stop = start + (numel if contiguous else _span(shape, stride)) * data.itemsize
            self._found.append(_Found(data, node, start, stop))
        return node

    def lay_out(self) -> list[torch.Tensor]:
        """Gives each tensor its extent; returns the extents' bytes."""
        storages: dict[tuple[torch.device, int], list[_Found]] = {}
        for found in self._found:
            storage = found.tensor.untyped_storage()
            storages.setdefault((found.tensor.device, storage.data_ptr()), []).append(found)
        groups: dict[int, list[_Found]] = {}
        for members in storages.values():
            for group in _overlapping(members):
                for found in group:
                    groups[id(found)] = group
        sources: list[torch.Tensor] = []
        for found in self._found:  # extents are numbered in order of first appearance
            if found.extent == -1:
                sources.append(_place(groups[id(found)], len(sources)))
        return sources


def _overlapping(members: list[_Found]) -> list[list[_Found]]:
    if len(members) == 1:
        return [members]
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


def _place(group: list[_Found], extent: int) -> torch.Tensor:
    first = group[0]
    start = first.start
    if len(group) == 1:
        first.extent = first.node[5] = extent
        if first.tensor.nbytes >= first.stop - start:
            return _bytes_of(first.tensor, start, first.stop - start)
        first.node[6] = True
        return _bytes_of(first.tensor.contiguous(), 0, first.tensor.nbytes)
    if any((f.start - start) % f.tensor.itemsize for f in group):
        start -= start % 16  # views of different element sizes: keep every offset a multiple of its size
    for found in group:
        found.extent = found.node[5] = extent
        found.node[4] = found.start - start
    return _bytes_of(first.tensor, start, max(f.stop for f in group) - start)


def _bytes_of(tensor: torch.Tensor, start: int, length: int) -> torch.Tensor:
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(tensor.untyped_storage(), start, (length,), (1,))
