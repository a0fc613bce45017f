"""Disks that take no more: really full (ENOSPC), or a limit on the size of files (EFBIG), the safe variant.

Rules:

- What fills the disk is one file without a name: the space comes back when the effect ends, and at the latest with the
  death of the process, however it dies.
- Nothing is written before it is known that the limit holds. Space that others free meanwhile is not filled again.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from pathlib import Path

from torchft.testing.faults.announcing import announce
from torchft.testing.faults.effect import Effect

__all__ = ["fill_disk", "limit_file_size"]

_LARGEST = 64 * 1024 * 1024
_SMALLEST = 512


def fill_disk(
    path: str | os.PathLike[str], *, leave: int = 0, limit: int = 1 << 30, seconds: float | None = None
) -> Effect:
    """Takes the free space of a file system: writes there fail with ENOSPC.

    Meant for a small file system made for it (a tmpfs, a loop device): everything else that lives there sees it too.

    Args:
        path: a folder of that file system.
        leave: bytes left free.
        limit: most bytes to take, 1 GiB by default.
        seconds: after which the space is given back; None: when released.

    Returns:
        Releasing it gives the space back.

    Raises:
        ValueError: ``leave`` is negative, or more than ``limit`` bytes are free: nothing was written, or all of it was
            given back.
        OSError: the folder cannot be written to.
    """
    if leave < 0:
        raise ValueError(f"{leave} bytes cannot be left free")
    free = _free(path)
    too_much = (
        f"{os.fspath(path)!r} has {free} bytes free, and filling it up to {leave} takes more than the limit of {limit} "
        "bytes: use a small file system, or raise limit="
    )
    if free - leave > limit:
        raise ValueError(too_much)
    announce("fill_disk", os.fspath(path), f"{max(0, free - leave)} bytes")
    file = tempfile.TemporaryFile(dir=path)  # noqa: SIM115 the effect closes it
    taken = 0
    step = _LARGEST
    try:
        while step >= _SMALLEST:
            if leave and _free(path) - step < leave:
                step //= 2
                continue
            if taken + step > limit:
                if step > _SMALLEST:
                    step //= 2
                    continue
                raise ValueError(too_much)  # others gave space back while it was taken
            try:
                os.posix_fallocate(file.fileno(), taken, step)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                step //= 2
            else:
                taken += step
    except BaseException:
        file.close()
        raise

    def give_back() -> None:
        with file:
            file.truncate(0)  # a forked child may still hold the file open

    return Effect(f"full disk at {Path(path)}", give_back, seconds)


def limit_file_size(size: int, seconds: float | None = None) -> Effect:
    """This process, and what it starts meanwhile, writes no file beyond ``size`` bytes: EFBIG (``RLIMIT_FSIZE``).

    Nothing is written and no other process sees it. It holds for every file, a log on standard error that is a file
    included; not for pipes, sockets and terminals.

    Args:
        size: bytes.
        seconds: after which the former limit is set again; None: when released.

    Returns:
        Releasing it sets the former limit.

    Raises:
        ValueError: ``size`` is negative or above the hard limit; or SIGXFSZ, which Python ignores from its start, is
            not ignored, and this is not the main thread.
    """
    former, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size < 0 or (hard != resource.RLIM_INFINITY and size > hard):
        raise ValueError(f"files cannot be limited to {size} bytes, the hard limit is {hard}")
    if signal.getsignal(signal.SIGXFSZ) is not signal.SIG_IGN:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # it would end the process instead of failing the write
    announce("limit_file_size", f"process {os.getpid()} (this one)", f"{size} bytes")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return Effect("limit of file sizes", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (former, hard)), seconds)


def _free(path: str | os.PathLike[str]) -> int:
    """Bytes this user can still write there: root may use what is reserved."""
    s = os.statvfs(path)
    return (s.f_bfree if os.geteuid() == 0 else s.f_bavail) * s.f_frsize
