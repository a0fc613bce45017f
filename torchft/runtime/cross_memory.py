"""Reading another process's memory: Linux's cross memory attach, ``man 2 process_vm_readv``.

The kernel copies from one process's memory into the other's, once, with no help of the process that is read. It lets
who may trace that process do so: mostly, the processes of one user. Where ``kernel.yama.ptrace_scope`` is 1 or more
(Ubuntu), or a container's seccomp profile forbids it, it answers ``EPERM``.

Rules
    - Nothing says whether the memory is still what it was when its address was told: who reads compares a hash.
    - ``ctypes`` lets other threads run meanwhile. A call is never interrupted: read a few MiB at a time.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence

__all__ = ["address_of", "can_read_others", "read_memory"]

_MOST = 1024
"""``IOV_MAX`` of Linux."""
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" and struct.calcsize("P") == 8 else None
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t


def can_read_others() -> bool:
    """Whether this system has the call at all."""
    return _readv is not None


def address_of(view: memoryview) -> int:
    """Where the bytes of a writable view of at least one byte are in this process's memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def read_memory(pid: int, spans: Sequence[tuple[int, int]], into: Sequence[memoryview]) -> None:
    """Copies bytes of another process's memory.

    Args:
        pid: whose.
        spans: address and length of each run of bytes, in order.
        into: writable, of as many bytes as all spans together; they may be cut elsewhere.

    Raises:
        OSError: ``EPERM``, this process may not; ``ESRCH``, there is no such process; ``EFAULT``, not all of that is
            memory; ``ENOSYS``, this system has no such call. What is in ``into`` then is anything.
    """
    if _readv is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    theirs = array.array("Q", [n for span in spans for n in span])
    ours = array.array("Q", [n for view in into for n in (address_of(view), len(view))])
    count = sum(map(len, into))
    if len(spans) > _MOST or len(into) > _MOST or sum(length for _, length in spans) != count:
        raise OSError(errno.EINVAL, f"{len(spans)} runs of memory into {len(into)}")
    moved = _readv(
        ctypes.c_int(pid),
        ctypes.c_void_p(ours.buffer_info()[0]),
        ctypes.c_ulong(len(into)),
        ctypes.c_void_p(theirs.buffer_info()[0]),
        ctypes.c_ulong(len(spans)),
        ctypes.c_ulong(0),
    )
    if moved != count:
        number = ctypes.get_errno() if moved < 0 else errno.EFAULT
        raise OSError(number, os.strerror(number))
