"""Checkpoints on disk, written beside the training and read when nobody holds the state any more.

The idea
    The training loop pays for one copy of the state into memory that is kept for the next time. A thread writes it to
    the disk: :mod:`torchft.checkpointing.group_save` says how the ranks of a group do it together,
    :mod:`torchft.checkpointing.shard` what a rank's part is, and :mod:`torchft.checkpointing.directory` how the parts
    are one checkpoint, complete or not there.

Rules
    - One save at a time. One that is due while another is still written is left out, with a warning: a slow disk
      costs checkpoints, never steps.
    - A save that fails is an error in the log, with the path, the cause and the way out; it leaves nothing behind. The
      training goes on, unless ``max_failures`` says otherwise: its live state is worth more than a checkpoint.
    - All ranks of a group need the same directory. Groups may have different ones.
    - Nothing is pickled, and what is read is checked before a byte of it is used.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import errno
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torchft.checkpointing import save_metrics
from torchft.checkpointing.description import describe
from torchft.checkpointing.directory import DamagedCheckpoint, check_files, complete, read_marker
from torchft.checkpointing.group_save import say_failed, write_part
from torchft.checkpointing.shard import Shard, chunk_offsets, file_names, read_shard
from torchft.checkpointing.snapshot import Arena, SideStreams
from torchft.checkpointing.transport import CheckpointError
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.tracebacks import without_frames
from torchft.runtime.worker import Worker

__all__ = ["Checkpoints", "Loaded", "NoMemoryForSnapshot", "load_latest", "save"]

logger = logging.getLogger(__name__)

_AT_EXIT = 60.0
"""Seconds that a program which ends without ``close`` waits for a save under way."""

_HINTS = {
    errno.ENOSPC: "the disk is full: free space there, or keep fewer",
    errno.EDQUOT: "the quota is used up: free space there, or keep fewer",
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.EACCES: "this user may not write there: choose another directory, or give it the right",
    errno.EPERM: "this user may not write there: choose another directory, or give it the right",
    errno.ENOENT: "a folder of that path is not there: is it right, and mounted? If so, make the folder above it",
    errno.ENOTDIR: "a file is where a folder should be: choose another directory",
    errno.EFBIG: "no file may be that large there: raise the limit (ulimit -f), or choose another file system",
    errno.EIO: "the disk or the network to it fails: look into the system's log, and choose another directory",
    errno.ESTALE: "the network file system has lost it: mount it anew",
}


class NoMemoryForSnapshot(CheckpointError):
    """There is none for a copy of the state."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read."""

    step: int
    state: object
    path: Path


class Checkpoints:
    """A directory of checkpoints.

    Passed to ``Manager(checkpoints=…)`` it is all there is to do. Without a Manager call :meth:`save` in the loop and
    :meth:`load_latest` before it.

    Args:
        directory: made when it is not there, in a folder that must be: a mistyped path is an error. The same for all
            ranks of a group. May be shared by all groups.
        every: the steps between two saves.
        keep: how many complete checkpoints are kept.
        timeout: longest wait for the parts of a group's other ranks, and for a save under way when this is closed.
        max_failures: after more saves in a row that failed :meth:`save` raises; None: never, see the log.
        allow_pickle: also save and load what the format refuses, as with the transports.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int = 100,
        keep: int = 3,
        *,
        timeout: timedelta = timedelta(minutes=10),
        max_failures: int | None = None,
        allow_pickle: bool = False,
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1")
        self.directory = Path(directory).absolute()  # wherever the program goes
        self.every = every
        self.keep = keep
        self.failures = 0
        """Saves in a row that failed."""
        self.last_error: Exception | None = None
        """What the last save failed with; None: it was completed."""
        self._timeout = seconds(timeout)
        self._max_failures = max_failures
        self._allow_pickle = allow_pickle
        self._arena = Arena()
        self._worker: Worker | None = None
        self._job: concurrent.futures.Future[Path] | None = None
        self._began = 0.0
        self._step = -1
        self._stop = threading.Event()
        self._process = os.getpid()
        _alive.add(self)

    def due(self, step: int) -> bool:
        """Whether the state of this step is to be saved."""
        return step > 0 and step % self.every == 0

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._job is not None and not self._job.done()

    def check(self, state: object) -> None:
        """Whether checkpoints of this state could be saved, before the first of them is due.

        Raises:
            UnsafeStateError: the state holds something that cannot be saved.
            CheckpointError: the directory cannot be made, or not written to.
        """
        describe(state, self._allow_pickle)
        try:
            self.directory.mkdir(exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as e:
            hint = _HINTS.get(e.errno or 0, "is it the right one?")
            raise CheckpointError(f"no checkpoint could be saved to {self.directory}: {e.strerror or e}: {hint}") from e

    def save(
        self,
        step: int,
        state: object,
        *,
        rank: int = 0,
        world_size: int = 1,
        writer: str = "",
        given_up: Sequence[Path] | None = None,
    ) -> concurrent.futures.Future[Path] | None:
        """Takes a snapshot and has it written.

        All ranks of a sharded group must save the same steps: none of them while another one is still :attr:`saving`.
        The Manager sees to that.

        Args:
            step: the state is of.
            state: as it is now; it may be changed when this returns.
            rank, world_size: of this process in its group.
            writer: the same on all ranks of the group, and another one in each life and group, and when a step comes
                again after the job went back: else parts of two saves could be taken for one. A rank alone needs none.
            given_up: checkpoints of later steps, of a history that was given up: they are set aside. By default all
                that are there when the writing begins.

        Returns:
            The future of the checkpoint's folder (of rank 0; the other ranks' is that of the unfinished one); None if
            the last save is still under way: this one is left out then.

        Raises:
            ValueError: the step is below 0, or has more than 18 digits; or there are several ranks and no ``writer``.
            UnsafeStateError: the state holds something that cannot be saved.
            NoMemoryForSnapshot: there is none for a copy of the state.
            CheckpointError: more than ``max_failures`` saves in a row failed.
        """
        if not 0 <= step < 10**18:
            raise ValueError(f"step={step} is none that a checkpoint can be of: it would never be found again")
        if not writer and world_size > 1:
            raise ValueError(
                "writer= is missing: the same text on all ranks of the group, and another one each time the program is "
                "started, a random one of rank 0, say"
            )
        writer = writer or secrets.token_hex(8)
        if self.saving:
            self.leave_out(step)
            return None
        if self._max_failures is not None and self.failures > self._max_failures:
            raise CheckpointError(
                f"{self.failures} saves in a row failed, max_failures is {self._max_failures}. Last: {self.last_error}"
            )
        self._began, self._step = time.monotonic(), step
        try:
            shard = self._snapshot(step, state, rank)
        except CheckpointError as e:
            if rank:  # else rank 0 waits for its part
                say_failed(self.directory, step, writer, rank, e)
            raise
        copied = time.monotonic() - self._began
        save_metrics.WAITED_SECONDS.inc(copied)
        if self._worker is None:
            self._worker = Worker("torchft-checkpoint")
        part = [shard]
        self._job = self._worker.submit(lambda: self._carry_out(part, world_size, writer, copied, given_up))
        return self._job

    def _snapshot(self, step: int, state: object, rank: int) -> Shard:
        manifest, extents = describe(state, self._allow_pickle)
        sources = [e.tensor() for e in extents]
        try:
            run = self._arena.reserve(sources)
        except (RuntimeError, MemoryError, OSError) as e:
            raise NoMemoryForSnapshot(
                f"there is no memory for a copy of the state, {manifest.total} bytes ({e}): give the process more, or "
                "save less of it"
            ) from e
        self._arena.fill(sources, SideStreams(sources), Deadline(self._timeout), lambda ready: None)
        return Shard(step, rank, manifest, run, chunk_offsets(state))

    def leave_out(self, step: int) -> None:
        """Says that a step is not saved because the last save is still under way."""
        save_metrics.LEFT_OUT.inc()
        logger.warning(
            "step %d is not saved to %s: after %.0f s step %d is still being written. Save less often, or to a faster "
            "disk",
            step,
            self.directory,
            time.monotonic() - self._began,
            self._step,
        )

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """Waits for a save under way. Returns whether there is none any more.

        Args:
            timeout: the longest wait; that of the constructor by default.
        """
        if self._job is not None:
            concurrent.futures.wait([self._job], timeout=self._timeout if timeout is None else seconds(timeout))
        return not self.saving

    def close(self, timeout: timedelta | float | None = None) -> bool:
        """Lets a save under way end, gives it up after ``timeout``, and frees memory. Idempotent.

        Returns:
            Whether it ended.
        """
        _alive.discard(self)
        ended = self.wait(timeout)
        self._stop.set()
        if self._worker is not None:
            self._worker.shutdown(timeout=0.0 if not ended else 1.0)
        if ended:
            self._arena.close()
        return ended

    # ------------------------------------------------------------- writing

    def _carry_out(
        self, part: list[Shard], world_size: int, writer: str, copied: float, given_up: Sequence[Path] | None
    ) -> Path:
        shard = part.pop()  # it is this frame's alone, which the exception of a save that fails keeps
        try:
            folder = write_part(
                self.directory,
                shard,
                world_size,
                writer,
                self.keep,
                timeout=self._timeout,
                stop=self._stop,
                given_up=given_up,
            )
        except Exception as e:
            self.report(shard.step, without_frames(e, contexts=True))
            del shard
            raise
        self.failures, self.last_error = 0, None
        took = time.monotonic() - self._began
        save_metrics.SAVED.inc()
        save_metrics.SAVED_BYTES.inc(shard.run.total)
        save_metrics.SAVED_SECONDS.inc(took)
        save_metrics.NEWEST_STEP.set(shard.step)
        logger.log(
            logging.DEBUG if shard.rank else logging.INFO,  # the other ranks have written a part, and rank 0 says more
            "saved step %d to %s: %d bytes in %.2f s, of which the training waited %.3f s for the copy",
            shard.step,
            folder,
            shard.run.total,
            took,
            copied,
        )
        return folder

    def report(self, step: int, error: Exception) -> None:
        """A step could not be saved: counts it, and says so in the log."""
        self.failures += 1
        self.last_error = error
        save_metrics.FAILED.inc()
        number = error.errno if isinstance(error, OSError) else None
        hint = _HINTS.get(number or 0, "look into what it says")
        logger.error(
            "step %d could not be saved to %s (%d failed in a row): %s. The training goes on without it; the newest "
            "complete checkpoint is %s. What to do: %s",
            step,
            self.directory,
            self.failures,
            error,
            self._newest(),
            hint,
        )

    def _newest(self) -> str:
        try:
            return next((folder.name for _, folder in self.candidates()), "none at all")
        except CheckpointError as e:
            return f"not known ({e})"

    # ------------------------------------------------------------- reading

    def candidates(self) -> list[tuple[int, Path]]:
        """Steps and folders that look complete, the newest first.

        Raises:
            CheckpointError: the directory is there and cannot be read.
        """
        try:
            return complete(self.directory)
        except OSError as e:
            hint = _HINTS.get(e.errno or 0, "is it the right one?")
            raise CheckpointError(f"{self.directory} cannot be read: {e.strerror or e}: {hint}") from e

    def verify(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        """Checks all that a rank would read of a checkpoint.

        Raises:
            DamagedCheckpoint: something is missing or was changed. The message names the file.
        """
        marker = read_marker(folder)
        names = [name for r in range(marker.world_size) for name in file_names(r)[1:]]
        if world_size == marker.world_size:
            names.append(file_names(rank)[0])
        else:
            names += [file_names(r)[0] for r in range(marker.world_size)]
        check_files(folder, marker, names)

    def load(self, folder: Path, into: object | None = None, rank: int = 0, world_size: int = 1) -> Loaded:
        """Reads a checkpoint that was verified.

        Args:
            folder: of the checkpoint.
            into: a state whose tensors are read into where path, dtype and shape match; needed where DTensors of a
                group of another size are to be put together.
            rank, world_size: of this process in its group.

        Raises:
            CheckpointError: it cannot be read. Tensors of ``into`` may have been written then.
        """
        marker = read_marker(folder)
        if world_size == marker.world_size:
            state = read_shard(folder, rank, marker.step, into, self._allow_pickle)
        else:
            from torchft.checkpointing.dcp import load_resharded  # it imports much of torch that is seldom needed

            logger.info("%s was saved by %d ranks, this group has %d", folder, marker.world_size, world_size)
            state = load_resharded(folder, rank, into, self._allow_pickle)
        return Loaded(marker.step, state, folder)

    def load_latest(self, into: object | None = None, *, rank: int = 0, world_size: int = 1) -> Loaded | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Args: as of :meth:`load`.

        Raises:
            DamagedCheckpoint: there are some, and none of them can be used.
            CheckpointError: it cannot be read.
        """
        refused: dict[Path, str] = {}
        while True:
            found = [c for c in self.candidates() if c[1] not in refused]
            if not found:
                break
            folder = found[0][1]
            try:
                self.verify(folder, rank, world_size)
                return self.load(folder, into, rank, world_size)
            except DamagedCheckpoint as e:
                refused[folder] = str(e)
                if folder.exists():  # else a writer has deleted it meanwhile: there is a newer one
                    logger.warning("%s is passed over for the one before: %s", folder, e)
        damaged = {folder: why for folder, why in refused.items() if folder.exists()}
        if damaged:
            raise DamagedCheckpoint(
                f"none of the {len(damaged)} checkpoints in {self.directory} can be used; move them away to begin "
                f"without them. {'; '.join(damaged.values())}"
            )
        return None


_alive: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    for checkpoints in list(_alive):
        if checkpoints._process == os.getpid():  # a forked child has no part in its parent's save
            checkpoints.close(_AT_EXIT)


def save(
    directory: str | os.PathLike[str],
    step: int,
    state: object,
    *,
    keep: int = 3,
    rank: int = 0,
    world_size: int = 1,
    writer: str = "",
    allow_pickle: bool = False,
) -> concurrent.futures.Future[Path]:
    """Takes a snapshot of a state and has it written as a checkpoint, in the background.

    A loop that saves again and again should hold a :class:`Checkpoints`, which keeps the snapshot's memory.

    Args: as of :class:`Checkpoints` and :meth:`Checkpoints.save`.

    Returns:
        The future of the checkpoint's folder. It has the exception that the writing failed with.

    Raises:
        UnsafeStateError: the state holds something that cannot be saved.
    """
    checkpoints = Checkpoints(directory, keep=keep, allow_pickle=allow_pickle)
    job = checkpoints.save(step, state, rank=rank, world_size=world_size, writer=writer)
    assert job is not None
    assert checkpoints._worker is not None
    job.add_done_callback(lambda _: checkpoints._arena.close())
    checkpoints._worker.shutdown()  # it takes no more, and ends when this one has
    return job


def load_latest(
    directory: str | os.PathLike[str],
    into: object | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    allow_pickle: bool = False,
) -> Loaded | None:
    """Reads the newest checkpoint of a directory that is whole.

    Args and errors: as of :meth:`Checkpoints.load_latest`.
    """
    checkpoints = Checkpoints(directory, allow_pickle=allow_pickle)
    return checkpoints.load_latest(into, rank=rank, world_size=world_size)
