"""One rank's part of a checkpoint on disk: written from a snapshot, checked, and read back.

The idea
    What a rank saves is what it would give to a healing peer: the same manifest (:mod:`torchft.checkpointing.manifest`)
    and the same run of bytes, in files instead of on a connection. So nothing is pickled, what is read is checked as if
    a stranger had sent it, tensors keep their strides and shared memory, and are read straight into live tensors.
    Where DTensors lie in their global tensors is written beside, so that torch's distributed checkpoint can read
    shards of another layout (:mod:`torchft.checkpointing.dcp`).

Files of rank R
    ``rank-R.data``: the extents, end to end. ``rank-R.manifest``: the manifest document. ``rank-R.json``, written last:
    ``{"files": {name: [bytes, xxh3_128]}, "chunks": {path: [offsets]}}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from torchft.checkpointing.chunks import ByteRun, read_manifest, write_manifest
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.directory import DamagedCheckpoint, FileHash, write_synced
from torchft.checkpointing.manifest import Manifest
from torchft.checkpointing.transport import CheckpointError
from torchft.checkpointing.tree import tensors_by_path
from torchft.dtensor import is_dtensor

__all__ = ["Shard", "ShardIndex", "chunk_offsets", "file_names", "read_index", "read_shard", "read_shard_manifest"]

_PIECE = 8 << 20


@dataclass(frozen=True)
class Shard:
    """What one rank writes."""

    step: int
    rank: int
    manifest: Manifest
    run: ByteRun
    """The data: a snapshot."""
    chunks: dict[str, list[int]]
    """For each DTensor, by path: where its local tensor lies in the global one."""

    def write(self, folder: Path, stop: Callable[[], bool]) -> None:
        """Writes the files into a folder that is there.

        Args:
            folder: of the checkpoint.
            stop: whether to give up; asked every few MiB.

        Raises:
            OSError: they cannot be written.
            CheckpointError: ``stop`` said so.
        """
        data, manifest, index = file_names(self.rank)
        digest = xxhash.xxh3_128()
        with (folder / data).open("wb", buffering=0) as f:
            for start in range(0, self.run.total, _PIECE):
                if stop():
                    raise CheckpointError("the save was given up")
                for view in self.run.views(start, min(start + _PIECE, self.run.total)):
                    digest.update(view)
                    while view:
                        view = view[f.write(view) :]
            os.fsync(f.fileno())
        document = write_manifest(self.step, self.manifest)
        write_synced(folder / manifest, document)
        files = {
            data: [self.run.total, digest.hexdigest()],
            manifest: [len(document), xxhash.xxh3_128_hexdigest(document)],
        }
        write_synced(folder / index, json.dumps({"files": files, "chunks": self.chunks}).encode())


@dataclass(frozen=True)
class ShardIndex:
    """What a rank's index says."""

    files: dict[str, FileHash]
    chunks: dict[str, list[int]]


def file_names(rank: int) -> tuple[str, str, str]:
    """Data, manifest and index of a rank."""
    return f"rank-{rank}.data", f"rank-{rank}.manifest", f"rank-{rank}.json"


def chunk_offsets(state: object) -> dict[str, list[int]]:
    """Where the local tensor of each DTensor of a state lies in the global one, by path."""
    sharded = [(path, tensor) for path, tensor in tensors_by_path(state) if is_dtensor(tensor)]
    if not sharded:
        return {}
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # see torchft.dtensor

    return {
        path: list(compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1])
        for path, t in sharded
    }


def read_index(folder: Path, rank: int) -> ShardIndex:
    """Reads a rank's index.

    Raises:
        DamagedCheckpoint: it is missing, or not one.
    """
    path = folder / file_names(rank)[2]
    try:
        document = json.loads(path.read_bytes())
        files = {str(k): FileHash(int(size), str(digest)) for k, (size, digest) in document["files"].items()}
        return ShardIndex(files, {str(k): [int(n) for n in v] for k, v in document["chunks"].items()})
    except OSError as e:
        raise DamagedCheckpoint(f"{path} cannot be read: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedCheckpoint(f"{path} is not an index: {e!r}") from e


def read_shard_manifest(folder: Path, rank: int, step: int, allow_pickle: bool = False) -> Manifest:
    """Reads a rank's manifest.

    Raises:
        DamagedCheckpoint: it is missing, not one, or of another step.
    """
    path = folder / file_names(rank)[1]
    try:
        found, manifest, _ = read_manifest(path.read_bytes(), allow_pickle)
    except OSError as e:
        raise DamagedCheckpoint(f"{path} cannot be read: {e}") from e
    except CheckpointError as e:
        raise DamagedCheckpoint(f"{path}: {e}") from e
    if found != step:
        raise DamagedCheckpoint(f"{path} is of step {found}, not {step}")
    return manifest


def read_shard(folder: Path, rank: int, step: int, into: object | None, allow_pickle: bool = False) -> object:
    """Reads a rank's state, whose files were checked.

    Args:
        into: a tree whose tensors are read into where path, dtype and shape match; None: all memory is fresh.

    Raises:
        DamagedCheckpoint: a file changed since it was checked. Tensors of ``into`` may have been written then.
    """
    manifest = read_shard_manifest(folder, rank, step, allow_pickle)
    destination = Destination(manifest, into)
    path = folder / file_names(rank)[0]
    try:
        with path.open("rb", buffering=0) as f:
            for start in range(0, manifest.total, _PIECE):
                for view in destination.run.views(start, min(start + _PIECE, manifest.total)):
                    while view:
                        if not (n := f.readinto(view)):
                            raise DamagedCheckpoint(f"{path} ends before its {manifest.total} bytes")
                        view = view[n:]
    except OSError as e:
        raise DamagedCheckpoint(f"{path} cannot be read: {e}") from e
    return destination.finish(allow_pickle)
