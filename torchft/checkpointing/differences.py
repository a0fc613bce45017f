"""Where two states differ, by the paths of what they hold."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from torchft.checkpointing.chunks import Cut
from torchft.checkpointing.manifest import Manifest, span
from torchft.checkpointing.tree import JSON

__all__ = ["differing_tensors", "differing_values", "tensors_in"]


def tensors_in(manifest: Manifest, cut: Cut, chunks: Collection[int]) -> list[str]:
    """Paths of the tensors that have bytes in these chunks."""
    size = cut.chunk_size
    return [
        path
        for path, first, stop in _places(manifest)
        if any(chunk in chunks for chunk in range(first // size, (stop - 1) // size + 1))
    ]


def differing_tensors(manifest: Manifest, start: int, mine: bytes, theirs: bytes) -> list[str]:
    """Paths of the tensors that are not the same in a piece of two states of one layout.

    Args:
        manifest: of both.
        start: where the piece begins in the data.
        mine, theirs: its bytes.
    """
    stop = start + len(mine)
    found: list[str] = []
    for path, first, end in _places(manifest):
        here = slice(max(first, start) - start, min(end, stop) - start)
        if here.start < here.stop and mine[here] != theirs[here]:
            found.append(path)
    return found


def differing_values(mine: bytes, theirs: bytes) -> list[str]:
    """Paths at which two trees are not the same, tensors' elements apart.

    Args:
        mine, theirs: manifests' bodies. Nothing of them is loaded; one that is none has no tree.
    """
    return list(_differing(_tree(mine), _tree(theirs), "state"))


def _places(manifest: Manifest) -> Iterator[tuple[str, int, int]]:
    """Path, first byte and end in the data of each tensor that has elements."""
    starts = manifest.starts
    for spec in manifest.tensors:
        if spec.extent >= 0:
            first = starts[spec.extent] + spec.offset
            nbytes = spec.nbytes if spec.packed else span(spec.shape, spec.stride) * spec.dtype.itemsize
            yield spec.path, first, first + nbytes


def _tree(body: bytes) -> JSON:
    try:
        return json.loads(body)["tree"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _differing(mine: JSON, theirs: JSON, path: str) -> Iterator[str]:
    if mine == theirs:
        return
    if not (isinstance(mine, list) and isinstance(theirs, list) and mine and theirs and mine[0] == theirs[0]):
        yield path
    elif mine[0] in ("d", "od"):
        yield from _differing_items(mine, theirs, path)
    elif mine[0] in ("l", "t") and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine[1:], theirs[1:], strict=True)):
            yield from _differing(a, b, f"{path}[{i}]")
    elif mine[0] not in ("T", "D") or _shape(mine) != _shape(theirs):
        yield path


def _differing_items(mine: list[JSON], theirs: list[JSON], path: str) -> Iterator[str]:
    one, other = (dict(zip(map(repr, node[1::2]), node[2::2], strict=False)) for node in (mine, theirs))
    for key in [*one, *(k for k in other if k not in one)]:
        if key in one and key in other:
            yield from _differing(one[key], other[key], f"{path}[{key}]")
        else:
            yield f"{path}[{key}]"


def _shape(tensor: list[JSON]) -> list[JSON]:
    """What a tensor's array says of itself, without its place, which others before it move."""
    return tensor[1:4] if tensor[0] == "T" else [*tensor[1:5], *(_shape(tensor[5]) if len(tensor) > 5 else ())]
