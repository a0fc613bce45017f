"""Checkpoints in a directory: what is complete, what is damaged, what may be deleted.

The idea
    A checkpoint is a folder that appears whole or not at all. It is written under another name, beside; each file is
    synced; a *marker* with the size and hash of every file is written last, synced, and only then the folder gets
    its name. Whoever reads checks the files against the marker before it uses a byte of them.

Layout
    ``step-000000000500/`` holds ``rank-0.data``, ``rank-0.manifest``, ``rank-0.json``, the same of further ranks, and
    ``COMPLETE.json``. ``.writing-000000000500-ID/`` is one that is being written, or was when its writer died.
    ``.replaced-step-000000000500-TIME`` is one whose step was written anew: it counts as long as there is no other of
    that step, since its writer may die before the new one has its name. ``.deleted-…`` is being deleted.

Rules
    - A folder without its marker, or one file of which does not have the announced size and hash, is not a
      checkpoint: it is passed over, with the reason.
    - The newest ``keep`` are kept. A complete one of a later step than the one just written belongs to a history that
      was given up (the job went back behind it): it is renamed to ``abandoned-…`` and never loaded.
    - What a dead writer left is deleted by a later one: the folder is locked (``flock``) as long as a writer lives.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from torchft.checkpointing.transport import CheckpointError

__all__ = [
    "MARKER",
    "DamagedCheckpoint",
    "FileHash",
    "Marker",
    "check_files",
    "complete",
    "folder_of",
    "hash_file",
    "held",
    "partial_of",
    "publish",
    "read_marker",
    "sync_folder",
    "tidy",
    "write_synced",
]

logger = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
_FORMAT = "torchft-checkpoint-directory/1"
_NAME = re.compile(r"step-(\d{12,18})")
_WRITING, _REPLACED, _DELETED, _ABANDONED = ".writing-", ".replaced-", ".deleted-", "abandoned-"
_SET_ASIDE = re.compile(r"\.replaced-(step-(\d{12,18}))-(\d+)")
_MAX_MARKER = 64 << 20
_MAX_NAME = 255
_PIECE = 8 << 20
_ORPHANED_AFTER = 60.0
"""Seconds without a change after which a folder without a living writer is left over."""
_ORPHANED_WITHOUT_LOCKS = 86400.0
"""The same where the file system has no locks."""


class DamagedCheckpoint(CheckpointError):
    """A folder is not a whole checkpoint. The message names the file and says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class FileHash:
    """A file's size, and the xxh3-128 of its content in hexadecimal."""

    nbytes: int
    digest: str


@dataclass(frozen=True)
class Marker:
    """What a complete checkpoint consists of."""

    step: int
    world_size: int
    """Ranks of the group that wrote it."""
    files: dict[str, FileHash] = field(default_factory=dict)

    def write(self) -> bytes:
        files = {name: [f.nbytes, f.digest] for name, f in sorted(self.files.items())}
        body = json.dumps(
            {"format": _FORMAT, "step": self.step, "world_size": self.world_size, "files": files}, indent=1
        )
        return json.dumps({"body": body, "xxh3_128": xxhash.xxh3_128_hexdigest(body.encode())}).encode()


def folder_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is when it is complete."""
    return directory / f"step-{step:012d}"


def partial_of(directory: Path, step: int, writer: str) -> Path:
    """Where it is while it is written; the same for all ranks of the group that writes."""
    return directory / f"{_WRITING}{step:012d}-{xxhash.xxh3_64_hexdigest(writer.encode())}"


def complete(directory: Path) -> list[tuple[int, Path]]:
    """The steps and folders that look complete, the newest first.

    Raises:
        OSError: the directory is there and cannot be read.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return _complete(directory, names)


def _complete(directory: Path, names: list[str]) -> list[tuple[int, Path]]:
    found = {int(m[1]): directory / name for name in names if (m := _NAME.fullmatch(name))}
    aside = [(int(m[3]), int(m[2]), name) for name in names if (m := _SET_ASIDE.fullmatch(name))]
    for _, step, name in sorted(aside, reverse=True):
        found.setdefault(step, directory / name)
    return sorted(found.items(), reverse=True)


def read_marker(folder: Path) -> Marker:
    """Reads and checks a checkpoint's marker.

    Raises:
        DamagedCheckpoint: it is missing, or not one.
    """
    path = folder / MARKER
    try:
        _size_of(path)
        with path.open("rb") as f:
            text = f.read(_MAX_MARKER + 1)
        outer = json.loads(text)
        body = outer["body"]
        if xxhash.xxh3_128_hexdigest(body.encode()) != outer["xxh3_128"]:
            raise DamagedCheckpoint(f"{path} does not have its own hash")
        inner = json.loads(body)
        if inner["format"] != _FORMAT:
            raise DamagedCheckpoint(f"{path} is of the format {inner['format']!r}, not {_FORMAT}")
        files = {str(name): FileHash(_count(size), str(digest)) for name, (size, digest) in inner["files"].items()}
        marker = Marker(_count(inner["step"]), _count(inner["world_size"]), files)
        if not 0 < marker.world_size <= max(1, len(files)):
            raise ValueError(f"{len(files)} files of {marker.world_size} ranks")
        for name in files:
            if "\0" in name or len(os.fsencode(name)) > _MAX_NAME:
                raise ValueError(f"the file name {name[:60]!r}")
    except FileNotFoundError as e:
        raise DamagedCheckpoint(f"{path} is missing: it was never completed") from e
    except OSError as e:
        raise DamagedCheckpoint(f"{path} cannot be read: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedCheckpoint(f"{path} is not a marker: {e!r}") from e
    if any("/" in name or name.startswith(".") for name in files):
        raise DamagedCheckpoint(f"{path} names a file outside of its folder")
    aside = _SET_ASIDE.fullmatch(folder.name)
    if (aside[1] if aside else folder.name) != folder_of(folder.parent, marker.step).name:
        raise DamagedCheckpoint(f"{path} is of step {marker.step}: the folder was renamed")
    return marker


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.60} is no count")
    return value


def _size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        DamagedCheckpoint: it is no file, so that reading it may never end.
        OSError: it is not there, or cannot be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{path} is no file")
    return found.st_size


def hash_file(path: Path) -> FileHash:
    """Size and hash of a file as it is.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    total = 0
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(view[:n])
            total += n
    return FileHash(total, digest.hexdigest())


def check_files(folder: Path, marker: Marker, names: list[str]) -> None:
    """Compares files with what the marker says of them; the sizes of all others too.

    Raises:
        DamagedCheckpoint: one is missing, too short or long, or holds other bytes.
    """
    for name, expected in sorted(marker.files.items()):
        path = folder / name
        try:
            size = _size_of(path)
            if size != expected.nbytes:
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {expected.nbytes}")
            if name in names and hash_file(path) != expected:
                raise DamagedCheckpoint(f"{path} does not have the hash it was written with: bytes in it have changed")
        except FileNotFoundError as e:
            raise DamagedCheckpoint(f"{path} is missing") from e
        except OSError as e:
            raise DamagedCheckpoint(f"{path} cannot be read: {e}") from e
    unknown = set(names) - set(marker.files)
    if unknown:
        raise DamagedCheckpoint(f"{folder} has no {', '.join(sorted(unknown))}: it was written by another layout")


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file that is there whole, under its name and on the disk, or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)


def sync_folder(path: Path) -> None:
    """Makes names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, directory: Path, marker: Marker) -> Path:
    """A folder whose files are all written and synced becomes the checkpoint of its step."""
    write_synced(partial / MARKER, marker.write())
    sync_folder(partial)
    folder = folder_of(directory, marker.step)
    if folder.exists():
        folder.rename(directory / f"{_REPLACED}{folder.name}-{time.time_ns()}")
    partial.rename(folder)
    sync_folder(directory)
    return folder


def tidy(directory: Path, step: int, keep: int, abandoned: Sequence[Path]) -> None:
    """Deletes what is no longer needed after the checkpoint of ``step`` was completed.

    Args:
        keep: how many up to this step are kept.
        abandoned: those of later steps that are of a history that was given up.

    Raises:
        OSError: something could not be deleted.
    """
    names = os.listdir(directory)
    counts = {folder.name for _, folder in _complete(directory, names)}  # of these names: another writer may come
    for name in names:
        if name.startswith(_REPLACED) and name not in counts:  # first: it is not to count when another one goes
            _delete(directory, name)
    for folder in abandoned:
        if not folder.exists():
            continue
        aside = directory / f"{_ABANDONED}{folder.name}-{time.time_ns()}"
        folder.rename(aside)
        logger.warning("%s is of a history that was given up; it is kept as %s and not loaded", folder, aside.name)
    for _, folder in [f for f in complete(directory) if f[0] <= step][keep:]:
        _delete(directory, folder.name)
    for name in os.listdir(directory):
        path = directory / name
        if name.startswith(_DELETED) or (name.startswith(_WRITING) and _orphaned(path)):
            shutil.rmtree(path, ignore_errors=True)


def _delete(directory: Path, name: str) -> None:
    doomed = directory / f"{_DELETED}{name}-{time.time_ns()}"
    (directory / name).rename(doomed)  # it vanishes at once, and not file by file
    shutil.rmtree(doomed)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Meanwhile nobody takes the folder for a left one, as long as this process lives."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            pass  # a file system without locks: age tells
        yield
    finally:
        os.close(handle)


def _orphaned(folder: Path) -> bool:
    """Whether no writer of this folder lives any more."""
    handle = None
    try:
        age = time.time() - max(p.stat().st_mtime for p in [folder, *folder.iterdir()])
        if age < _ORPHANED_AFTER:
            return False
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return age > _ORPHANED_WITHOUT_LOCKS if handle is not None else False
    finally:
        if handle is not None:
            os.close(handle)
    return True
