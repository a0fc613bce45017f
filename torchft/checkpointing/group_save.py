"""One checkpoint on disk, written by all ranks of a group.

The idea
    Each rank writes its part (:mod:`torchft.checkpointing.shard`) into one folder, which has a name that no reader
    looks for. Rank 0 waits for the parts of all, and makes the folder the checkpoint of its step
    (:mod:`torchft.checkpointing.directory`). The ranks tell each other nothing but by files in that folder: a part is
    there when its index is, and a rank that could not write leaves a note that says why.

Rules
    - Every wait ends: with the part, with the note, at the deadline, or when the save is given up.
    - A save that fails leaves nothing of rank 0's behind; what a dead one left is deleted by a later save.
    - What is no longer needed is deleted only when the new checkpoint is complete.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from torchft.checkpointing.directory import Marker, complete, hash_file, held, partial_of, publish, tidy
from torchft.checkpointing.shard import Shard, file_names, read_index
from torchft.checkpointing.transport import CheckpointError, CheckpointTimeout
from torchft.runtime.deadline import Deadline

__all__ = ["say_failed", "write_part"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.5


def write_part(
    directory: Path,
    shard: Shard,
    world_size: int,
    writer: str,
    keep: int,
    *,
    timeout: float,
    stop: threading.Event,
    given_up: Sequence[Path] | None = None,
) -> Path:
    """Writes a rank's part; as rank 0 also waits for the others', completes the checkpoint, and tidies up.

    Args:
        directory: of the checkpoints; made when it is not there, in a folder that is.
        shard: the part.
        world_size: ranks of the group.
        writer: the same on all ranks of the group, and another one in each life and group.
        keep: how many complete checkpoints up to this step are kept.
        timeout: seconds that the others' parts are waited for.
        stop: set when the save is given up.
        given_up: checkpoints of a history that was given up. None: all that are there now of later steps.

    Returns:
        The checkpoint's folder; of another rank than 0 that of the unfinished one.

    Raises:
        OSError: it cannot be written.
        CheckpointError: another rank could not write its part, or the save was given up.
        CheckpointTimeout: the part of another rank did not come.
    """
    if given_up is None:
        given_up = [folder for step, folder in complete(directory) if step > shard.step]
    partial = partial_of(directory, shard.step, writer)
    directory.mkdir(exist_ok=True)
    partial.mkdir(exist_ok=True)
    with held(partial):
        try:
            shard.write(partial, stop.is_set)
            if shard.rank:
                return partial
            marker = _gather(partial, shard.step, world_size, timeout, stop)
            folder = publish(partial, directory, marker)
        except BaseException as e:
            if shard.rank:
                _say_failed(partial, shard.rank, e)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    try:
        tidy(directory, shard.step, keep, given_up)
    except OSError as e:
        logger.warning("what is no longer needed in %s could not be deleted: %s", directory, e)
    return folder


def _gather(partial: Path, step: int, world_size: int, timeout: float, stop: threading.Event) -> Marker:
    """The marker of a checkpoint, once all ranks have written their parts."""
    deadline = Deadline(timeout)
    marker = Marker(step, world_size)
    pause = _FIRST_PAUSE
    for rank in range(world_size):
        index, failed = partial / file_names(rank)[2], _failure(partial, rank)
        while not index.exists():
            if failed.exists():
                why = failed.read_text() or "it could not even write down why: is the disk full?"
                raise CheckpointError(f"rank {rank} could not write its part: {why}")
            if deadline.expired:
                raise CheckpointTimeout(
                    f"rank {rank} has not written its part to {partial} within {timeout:g} s: do all ranks "
                    f"of the group see the same directory?"
                )
            if stop.wait(min(pause, deadline.remaining())):
                raise CheckpointError("the save was given up")
            pause = min(2 * pause, _LONGEST_PAUSE)
        marker.files.update(read_index(partial, rank).files)
        marker.files[index.name] = hash_file(index)
    return marker


def say_failed(directory: Path, step: int, writer: str, rank: int, error: BaseException) -> None:
    """Tells rank 0 that a rank has no part to write. Arguments as of :func:`write_part`."""
    partial = partial_of(directory, step, writer)
    with contextlib.suppress(OSError):  # else rank 0 finds out at its deadline
        directory.mkdir(exist_ok=True)
        partial.mkdir(exist_ok=True)
    _say_failed(partial, rank, error)


def _failure(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank}.failed"


def _say_failed(partial: Path, rank: int, error: BaseException) -> None:
    note = _failure(partial, rank)
    try:
        unread = note.with_suffix(".failing")  # rank 0 looks for the note at any moment: it must be whole by then
        with contextlib.suppress(OSError):
            unread.write_text(f"{type(error).__name__}: {error}"[:1000])
        unread.rename(note)  # an empty one, of a full disk, is a note too
    except OSError:
        pass  # rank 0 finds out at its deadline
