"""Where a received state's bytes go: live tensors that fit, else fresh memory.

Rules
    - An extent is received *in place* if every tensor in it has a counterpart at the same path with the same dtype,
      shape and strides, in CPU memory, laid out relative to each other as at the source, and one of them fills the
      extent, so that no byte outside of these tensors is written.
    - A counterpart of the same dtype and shape that cannot be written as bytes (other strides, other device, a
      packed tensor) gets its values by ``copy_`` once everything is verified.
    - No memory is written twice: where live tensors share memory (as far as their first and last byte tell) that the
      source's do not share, only the first is written, and the others are handed out in fresh memory.
    - Fresh memory is allocated once per extent, so tensors that shared memory share it again.
    - A counterpart that was given other memory while its bytes came (``parameter.data = …``) is left as it is, and what
      came is handed out beside it.
    - Extents of fewer than ``in_place_from`` bytes get fresh memory (transport.py, ``COPY_BELOW``).
    - A DTensor's counterpart is a DTensor of the same global shape and placements; its local tensor is what is filled.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchft.checkpointing.chunks import ByteRun
from torchft.checkpointing.live import LiveTensor, LiveTensors
from torchft.checkpointing.manifest import Manifest, TensorSpec, are_apart, span
from torchft.checkpointing.memory import huge_empty
from torchft.checkpointing.mesh import MeshSpec
from torchft.checkpointing.transport import CheckpointError
from torchft.runtime.collection import collection_put_off

__all__ = ["Destination"]

_MISFITS = 3
"""Tensors that differ, named one by one."""


class Destination:
    """Memory for one state that is about to arrive.

    Args:
        manifest: what will arrive.
        into: tensors that are received into where they fit, or a tree of them; None: all memory is fresh.
        device: where fresh tensors are handed out.
        in_place_from: bytes of the smallest extent that is received in place.
        before: of an attempt that failed: its fresh memory is used again where it has the size.

    Raises:
        CheckpointError: there is not enough memory.
    """

    @collection_put_off()
    def __init__(
        self,
        manifest: Manifest,
        into: object | None = None,
        device: torch.device | None = None,
        in_place_from: int = 0,
        before: Destination | None = None,
    ) -> None:
        self._manifest = manifest
        self._device = device or torch.device("cpu")
        self._live = live = into if isinstance(into, LiveTensors) else LiveTensors(into)
        self._meshes: dict[MeshSpec, DeviceMesh] = {}
        for given in live.dtensors():
            self._meshes.setdefault(MeshSpec.of(given.device_mesh), given.device_mesh)
        lengths = manifest.extents
        members: list[list[tuple[TensorSpec, LiveTensor | None]]] = [[] for _ in lengths]
        empty: list[tuple[TensorSpec, LiveTensor | None]] = []
        for spec in manifest.tensors:
            if spec.extent < 0:
                empty.append((spec, _fitting(live, spec)))
            else:
                fit = _fitting(live, spec) if lengths[spec.extent] >= in_place_from else None
                members[spec.extent].append((spec, fit))
        self.bytes_in_place = 0
        self._in_place: set[int] = set()
        written = _Intervals()
        fillers = [_filler(found, length) for found, length in zip(members, lengths, strict=True)]
        alone = iter(written.add_all([(f.address, n) for f, n in zip(fillers, lengths, strict=True) if f is not None]))
        pieces: list[torch.Tensor | memoryview] = []
        for extent, (filler, length) in enumerate(zip(fillers, lengths, strict=True)):
            if filler is not None and next(alone):
                assert filler.view is not None
                self._in_place.add(extent)
                self.bytes_in_place += length
                pieces.append(filler.view)
            else:
                left = _left_over(before, extent, length)
                pieces.append(_fresh(length) if left is None else left)
        self._pieces = pieces
        self._by_copy: dict[str, LiveTensor] = {}
        rest = (found for extent, found in enumerate(members) if extent not in self._in_place)
        for spec, fit in itertools.chain(empty, *rest):
            if fit is not None and are_apart(fit.shape, fit.stride) and written.add(fit.address, _reach(fit.local)):
                self._by_copy[spec.path] = fit
        self.run = ByteRun(pieces)
        """Where to write the data."""

    def misfits(self) -> list[str]:
        """Live tensors that are not like what arrives at their path, in words, the first few. It is for the functions
        that load to say whether that is an error; but collectives between models that differ end a process.
        """
        found: list[str] = []
        for spec in self._manifest.tensors:
            live = None if spec.extent in self._in_place else self._live.get(spec.path)
            if live is None or spec.dtensor is not None or live.dtensor is not None:
                continue
            there, here = (spec.dtype, spec.shape), (live.dtype, live.shape)
            if there != here:
                found.append(
                    f"{spec.path} is {there[0]} {there[1]} at the source and {here[0]} {here[1]} here: are the groups' "
                    "models the same?"
                )
        more = len(found) - _MISFITS
        return found if more <= 0 else [*found[:_MISFITS], f"and {more} further tensors differ"]

    def piece(self, extent: int) -> torch.Tensor:
        """The memory of one extent, ``uint8``, on the host."""
        piece = self._pieces[extent]
        return torch.frombuffer(piece, dtype=torch.uint8) if isinstance(piece, memoryview) else piece

    def finish(self, allow_pickle: bool = False) -> object:
        """The state, once every byte of ``run`` is written and verified."""
        return self._manifest.build([self._tensor(s) for s in self._manifest.tensors], allow_pickle)

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        if spec.extent in self._in_place:
            live = self._live.get(spec.path)
            if live is not None and live.in_its_place:
                return live.given
        if spec.extent < 0:
            arrived = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype)
        else:
            arrived = torch.empty(0, dtype=spec.dtype)
            piece = self.piece(spec.extent)
            if spec.extent in self._in_place:
                piece = piece.clone()  # to begin where a storage does
            storage = piece.untyped_storage()
            if spec.packed:
                arrived.set_(storage, 0, spec.shape)  # type: ignore[call-overload]
                arrived = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype).copy_(arrived)
            else:
                arrived.set_(storage, spec.offset // spec.dtype.itemsize, spec.shape, spec.stride)
        by_copy = self._by_copy.get(spec.path)
        if by_copy is not None and by_copy.in_its_place:
            by_copy.local.detach().copy_(arrived)
            return by_copy.given
        if spec.dtensor is None:
            return arrived.to(self._device)
        known = self._meshes.get(spec.dtensor.mesh)
        mesh = known or self._meshes.setdefault(spec.dtensor.mesh, spec.dtensor.mesh.build())
        from torch.distributed.tensor import DTensor  # here only: see torchft.dtensor

        try:
            with torch.no_grad():
                return DTensor.from_local(
                    arrived.to(mesh.device_type),
                    mesh,
                    spec.dtensor.placements,
                    run_check=False,
                    shape=torch.Size(spec.dtensor.shape),
                    stride=spec.dtensor.stride,
                )
        except Exception as e:
            raise CheckpointError(f"the DTensor {spec.path} on a mesh of {mesh.device_type} cannot be made: {e}") from e


def _fitting(live: LiveTensors, spec: TensorSpec) -> LiveTensor | None:
    """The tensor at the same path, if it is of the same kind and shape."""
    found = live.get(spec.path)
    if found is None or found.dtype != spec.dtype or found.shape != spec.shape or not found.usable:
        return None
    theirs, ours = spec.dtensor, found.dtensor
    if theirs is None or ours is None:
        return found if theirs is None and ours is None else None
    same = tuple(ours.shape) == theirs.shape and tuple(ours.placements) == theirs.placements
    return found if same else None


def _filler(members: list[tuple[TensorSpec, LiveTensor | None]], length: int) -> LiveTensor | None:
    """The live tensor whose bytes are those of a whole extent, if all tensors of it may be written as bytes."""
    base: int | None = None
    filler: LiveTensor | None = None
    for spec, live in members:
        if live is None or spec.packed or not live.local.is_cpu or live.stride != spec.stride:
            return None
        start = live.address - spec.offset
        if base is not None and start != base:
            return None
        base = start
        if live.view is not None and len(live.view) == length:
            filler = live
    return filler


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last of its elements, both included."""
    if not tensor.numel():
        return 0
    return span(tensor.shape, tensor.stride()) * tensor.itemsize


def _left_over(before: Destination | None, extent: int, length: int) -> torch.Tensor | None:
    """Fresh memory of an earlier attempt for this extent."""
    piece = None if before is None or extent >= len(before._pieces) else before._pieces[extent]
    return piece if isinstance(piece, torch.Tensor) and piece.numel() == length else None


def _fresh(length: int) -> torch.Tensor:
    try:
        return huge_empty(length)
    except RuntimeError as e:
        raise CheckpointError(f"there is no memory for {length} bytes of the received state: {e}") from e


class _Intervals:
    """Address ranges that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add_all(self, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        """Does :meth:`add` for each, start and length: at once if they are the first, and apart."""
        ordered = sorted(ranges)
        starts = [start for start, _ in ordered]
        stops = [start + length for start, length in ordered]
        if self._starts or any(stop > start for stop, start in zip(stops, starts[1:], strict=False)):
            return [self.add(start, length) for start, length in ranges]
        self._starts, self._stops = starts, stops
        return [True] * len(ranges)

    def add(self, start: int, length: int) -> bool:
        """Takes a range, unless part of it is taken."""
        if not length:
            return True
        i = bisect.bisect_right(self._starts, start)
        if i and self._stops[i - 1] > start:
            return False
        if i < len(self._starts) and self._starts[i] < start + length:
            return False
        self._starts.insert(i, start)
        self._stops.insert(i, start + length)
        return True
