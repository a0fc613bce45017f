"""The description of a state: its tree, and where each tensor's bytes lie in one long run of bytes.

The idea
    Tensors are views of memory. The *extents* of a state are the runs of memory its tensors cover, merged where they
    overlap, so memory shared by several tensors (tied weights, views of one buffer) is one extent and travels once.
    Laid end to end, in order of first appearance, the extents are the *data* of the state.

Form (JSON, UTF-8, no spaces)
    ``{"extents": [bytes, …], "meshes": [mesh, …], "tree": …}``. A tensor in the tree is
    ``["T", dtype, shape, stride | null, offset, extent, packed]``: ``offset`` in bytes into its extent, ``stride`` in
    elements (null: contiguous), ``extent`` -1 if it has no elements. ``packed``: it is alone in its extent and does not
    fill it, and no two of its elements share memory, so they travel contiguously and get their strides back on arrival.
    Its position in the tree is its path. A DTensor is
    ``["D", global shape, global stride, mesh, placements, local "T"]``.

Invariants, checked on reading before anything is allocated
    Every tensor lies inside its extent, and its offset is a multiple of its element size. Counts, dimensions and
    sizes are bounded. What is read allocates as many bytes as ``total`` says, and no more; packed tensors that are
    spread out over more memory than they have bytes have a bound of their own.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from torchft.checkpointing.mesh import MeshSpec, parse_placements
from torchft.checkpointing.transport import ManifestError
from torchft.checkpointing.tree import DTYPES, JSON, MAX_PATHS, Decoder
from torchft.runtime.collection import collection_put_off

if TYPE_CHECKING:  # here only: see torchft.dtensor
    from torch.distributed.tensor import Placement

__all__ = [
    "MAX_MANIFEST_BYTES",
    "MAX_TOTAL",
    "DTensorSpec",
    "Manifest",
    "SpecReader",
    "TensorSpec",
    "are_apart",
    "contiguous_stride",
    "span",
]

MAX_MANIFEST_BYTES = 256 << 20
MAX_TOTAL = 1 << 50
_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 62
_MAX_SPREAD = 64
"""How much more memory than bytes the packed tensors of a state may take, beyond 1 GiB."""


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
    meshes: tuple[MeshSpec, ...] = field(default=(), repr=False)
    """Of the DTensors."""

    @functools.cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """In the order of the tree."""
        reader = SpecReader(self.extents, self.meshes)
        Decoder(reader.read, allow_pickle=True, load=False).decode(self.tree)
        return tuple(reader.specs)

    @property
    def starts(self) -> list[int]:
        """Where each extent begins in the data, and where the last one ends."""
        return list(itertools.accumulate(self.extents, initial=0))

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
        manifest = cls(bytes(body), document["tree"], tuple(extents), tuple(MeshSpec.parse(m) for m in meshes))
        reader = SpecReader(extents, manifest.meshes)
        try:
            Decoder(reader.read, allow_pickle, load=False).decode(manifest.tree)
        except RecursionError as e:
            raise ManifestError("the manifest's tree is nested too deeply") from e
        if len(reader.used) != len(extents):
            raise ManifestError("the manifest announces bytes that belong to no tensor")
        vars(manifest)["tensors"] = tuple(reader.specs)  # they are checked: not to be read again
        return manifest

    def build(self, tensors: Sequence[torch.Tensor], allow_pickle: bool = False) -> object:
        """The tree with these tensors in it, one for each of ``self.tensors``."""
        position = iter(tensors)
        return Decoder(lambda _node, _path: next(position), allow_pickle).decode(self.tree)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


class SpecReader:
    """Checks the tensors of a tree that came from the network.

    Args:
        extents: bytes of each.
        meshes: that DTensors may be on.
    """

    def __init__(self, extents: Sequence[int], meshes: Sequence[MeshSpec]) -> None:
        self._extents = extents
        self._meshes = meshes
        self.specs: list[TensorSpec] = []
        """What was read."""
        self.used: set[int] = set()
        self._paths = 0
        self._spread = 0
        self._packed = 0

    def read(self, node: list[JSON], path: str) -> None:
        self._paths += len(path)
        if self._paths > MAX_PATHS:
            raise ManifestError(f"the paths of the tensors have more than {MAX_PATHS} characters")
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
        stride = contiguous_stride(shape) if raw_stride is None else _sizes(raw_stride, path)
        if len(stride) != len(shape) or type(offset) is not int or offset < 0 or type(packed) is not bool:
            raise ManifestError(f"{path} has malformed strides or offset")
        if type(extent) is not int or not -1 <= extent < len(self._extents):
            raise ManifestError(f"{path} lies in an extent that does not exist")
        numel = math.prod(shape)
        if (numel == 0) != (extent == -1):
            raise ManifestError(f"{path} has {numel} elements, which does not fit extent {extent}")
        if numel:
            length = self._extents[extent]
            reach = (numel if raw_stride is None else span(shape, stride)) * dtype.itemsize
            if packed:
                fills = extent not in self.used and not offset and numel * dtype.itemsize == length
                if not fills or reach > MAX_TOTAL or not are_apart(shape, stride):
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
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements."""
    stride: list[int] = []
    step = 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last, both included. Not for a tensor without elements."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def are_apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two elements share memory, so that values may be copied into such a tensor. May err towards no."""
    step = 1
    for n, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if n < step:
                return False
            step = n * size
    return True
