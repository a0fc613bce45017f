"""The durable record of a lighthouse that is alone: its epoch and its last quorum, in a small file.

The idea
    Whatever a lighthouse knows is told to it anew by its members, but two things must survive it. Which epochs were
    used, so that no quorum id is ever used twice (:mod:`torchft.core.election`): each start takes the next epoch and
    writes it down before the first answer; the ids of an epoch are all its own. And who may be training without being
    heard of (:mod:`torchft.core.standing`), so that nobody takes their place: the members of a fenced quorum are
    written down before it is answered.

Rules
    - Writing is atomic: a new file beside the old one, flushed to the disk, renamed over it, the folder flushed. A
      crash or a full disk at any point leaves the old record or the new one, never a mixture.
    - A file that is damaged, cut short or not ours is refused and left as it is: guessing an epoch could repeat ids.
      Moving it away is the way out: members that still run tell the lighthouse the epoch that they have seen.
    - One lighthouse at a time: it holds a lock (``flock`` on ``FILE.lock``), which its kernel takes back when its
      process ends, however.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchft.core.election import MAX_EPOCH, LastQuorum

__all__ = ["RecordError", "StateFile", "last_from_json", "last_to_json"]

_KIND = "torchft lighthouse"
_VERSION = 1
_MAX_BYTES = 16 * 1024 * 1024
_MAX_TEXT = 64 * 1024

_locked: weakref.WeakSet[StateFile] = weakref.WeakSet()


class RecordError(RuntimeError):
    """The record cannot be used. The message says why, and what to do."""


class StateFile:
    """The record, locked from construction until :meth:`close`.

    Args:
        path: of the file. Its folder is made if there is none.

    Raises:
        RecordError: it is damaged, it is another program's, another lighthouse holds it, or the folder cannot be
            written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        with self._explained("cannot be locked"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self._explained("cannot be locked"):
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RecordError(
                        f"the state file {self.path} is in use by another lighthouse{self._holder()}. Stop that one, "
                        f"or give this one a file of its own (--state_file)."
                    ) from None
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            self.epoch, self.last = self._read()
        except BaseException:
            os.close(self._lock)
            raise
        self._open = True
        _locked.add(self)

    def advance(self, above: int = 0) -> int:
        """Takes the next epoch. When this returns, it is on the disk.

        Args:
            above: the new epoch is higher than this, too: one that members have seen.

        Raises:
            RecordError: it cannot be written, or there is no further epoch. The record is as before.
        """
        epoch = max(self.epoch, above) + 1
        if epoch > MAX_EPOCH:
            raise RecordError(f"the state file {self.path} says epoch {self.epoch}: there is none after {MAX_EPOCH}")
        self._write(epoch, self.last)
        self.epoch = epoch
        return epoch

    def remember(self, last: LastQuorum | None) -> None:
        """Takes the last quorum. When this returns, it is on the disk.

        Raises:
            RecordError: it cannot be written. The record is as before.
        """
        self._write(self.epoch, last)
        self.last = last

    def close(self) -> None:
        """Gives the lock back. Idempotent."""
        if self._open:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Lets go of the lock without giving it back: for a forked child, whose parent has it."""
        if self._open:
            self._open = False
            os.close(self._lock)

    # ----------------------------------------------------------- the file

    def _read(self) -> tuple[int, LastQuorum | None]:
        with self._explained("cannot be read"):
            try:
                with open(self.path, "rb") as f:
                    data = f.read(_MAX_BYTES + 1)
            except FileNotFoundError:
                return 0, None
        try:
            if len(data) > _MAX_BYTES:
                raise ValueError("it is far too long")
            return _parse(data)
        except ValueError as e:
            raise RecordError(
                f"the state file {self.path} is damaged, or not a lighthouse's: {e}. It was left as it is. If no other "
                f"program needs it, move it away (mv {self.path} {self.path}.damaged) and start again: groups that "
                f"still run tell the new lighthouse which epoch they have seen, and it takes a higher one."
            ) from None

    def _write(self, epoch: int, last: LastQuorum | None) -> None:
        fresh = f"{self.path}.new"
        try:
            with self._explained("cannot be written"):
                fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as f:
                    f.write(_format(epoch, last))
                    f.flush()
                    os.fsync(fd)
                os.replace(fresh, self.path)
                folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except RecordError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise RecordError(
                f"the state file {self.path} {what}: {e.strerror or e}. Free the disk or change the rights of "
                f"{self.path.parent}, or choose another place (--state_file)."
            ) from e

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return f" (process {int(os.pread(self._lock, 32, 0))})"
        return ""


def last_to_json(last: LastQuorum | None) -> dict[str, Any] | None:
    """As :func:`last_from_json` reads it."""
    return None if last is None else {"quorum_id": last.quorum_id, "members": [list(m) for m in last.members]}


def last_from_json(value: object) -> LastQuorum | None:
    """What was read, checked.

    Raises:
        ValueError: it is no quorum.
    """
    if value is None:
        return None
    quorum_id, members = (value.get("quorum_id"), value.get("members")) if isinstance(value, dict) else (None, None)
    if type(quorum_id) is not int or not 0 <= quorum_id < 2**62 or not isinstance(members, list):
        raise ValueError("its last quorum is none")
    for member in members:
        if not isinstance(member, list) or len(member) != 2:
            raise ValueError("its last quorum has members that are none")
        if not all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in member) or not member[0]:
            raise ValueError("its last quorum has members that are none")
    return LastQuorum(quorum_id, tuple((replica_id, life_address) for replica_id, life_address in members))


def _format(epoch: int, last: LastQuorum | None) -> bytes:
    body = json.dumps({"kind": _KIND, "version": _VERSION, "epoch": epoch, "last": last_to_json(last)})
    return f"{body}\n{zlib.crc32(body.encode()):08x}\n".encode()


def _parse(data: bytes) -> tuple[int, LastQuorum | None]:
    if not data:
        raise ValueError("it is empty")
    body, _, rest = data.partition(b"\n")
    if rest != f"{zlib.crc32(body):08x}\n".encode():
        raise ValueError("its checksum is wrong")
    record = json.loads(body)
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise ValueError("it is another program's")
    if record.get("version") != _VERSION:
        raise ValueError(f"it has version {record.get('version')!r}, this torchft knows {_VERSION}")
    epoch = record.get("epoch")
    if type(epoch) is not int or not 0 < epoch <= MAX_EPOCH:
        raise ValueError(f"its epoch is {epoch!r}")
    return epoch, last_from_json(record.get("last"))


def _after_fork_in_child() -> None:
    for file in list(_locked):
        file.forget()  # or the child would hold the lock after its parent's death


os.register_at_fork(after_in_child=_after_fork_in_child)
