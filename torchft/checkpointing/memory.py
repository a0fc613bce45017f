"""Memory as bytes: large fresh runs of it, and that of tensors.

Touching fresh memory page by page costs more than copying into it: each 4 KiB page is a fault. Where the kernel gives
2 MiB pages to those who ask (``/sys/kernel/mm/transparent_hugepage/enabled`` is ``madvise`` or ``always``), asking
makes filling fresh memory about twice as fast.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import NamedTuple

import torch

__all__ = ["StorageBytes", "byte_view", "huge_empty", "memory_view"]

_HUGE = 2 << 20
_LEAST = 32 << 20
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def huge_empty(length: int) -> torch.Tensor:
    """``length`` bytes of uninitialised CPU memory, ``uint8``, on large pages if there are any to have.

    Raises:
        RuntimeError: there is not enough memory.
    """
    tensor = torch.empty(length, dtype=torch.uint8)
    if _libc is not None and length >= _LEAST:
        start = -(-tensor.data_ptr() // _HUGE) * _HUGE
        stop = (tensor.data_ptr() + length) // _HUGE * _HUGE
        # Advice: a kernel without large pages answers EINVAL, and the memory is as good as before.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return tensor


def memory_view(storage: torch.UntypedStorage, start: int, length: int) -> memoryview:
    """Bytes of a storage in CPU memory, writable. As with numpy's arrays the storage stays alive as long as the view,
    and refuses to be resized from then on, which would free what the view is of.

    There may be many thousands of pieces: it takes less than half of what an array for each would.

    Args:
        storage: whose bytes.
        start: the first one.
        length: how many.
    """
    if storage.resizable():
        torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # forbids it, for good
    array = (ctypes.c_ubyte * length).from_address(storage.data_ptr() + start)
    array.storage = storage  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


class StorageBytes(NamedTuple):
    """Bytes of a storage, wherever it is, which they keep alive."""

    of: torch.Tensor
    """On whose device they are."""
    storage: torch.UntypedStorage
    start: int
    """The first one."""
    length: int

    @property
    def on_host(self) -> bool:
        """Whether they are in CPU memory."""
        return self.of.is_cpu

    def tensor(self) -> torch.Tensor:
        """As one-dimensional ``uint8``: a view."""
        return byte_view(self.of, self.storage, self.start, self.length)

    def view(self) -> memoryview:
        """Of those in CPU memory: see :func:`memory_view`."""
        return memory_view(self.storage, self.start, self.length)


def byte_view(tensor: torch.Tensor, storage: torch.UntypedStorage, start: int, length: int) -> torch.Tensor:
    """Bytes of a storage as one-dimensional ``uint8``.

    Args:
        tensor: on whose device they are.
        storage: whose bytes.
        start: the first one.
        length: how many.
    """
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(storage, start, (length,), (1,))
