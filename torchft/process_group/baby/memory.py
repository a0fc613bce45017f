"""Memory that a trainer and its child both have: blocks of bytes, used again and again.

The idea
    A block is an anonymous file in memory (``memfd_create``) that both processes map; the child gets it as an open
    file, once. On a GPU it is an allocation of the trainer that the child opens through CUDA's IPC (``gpu``). Making a
    block costs page faults in both processes, so blocks are kept and used again by collectives of about that size.

Rules
    1. A block belongs to one collective at a time, from :meth:`Pool.take` to :meth:`Pool.give_back`.
    2. A child's blocks are its own: when it is killed they go with it, so nothing of a killed child is seen again.
    3. Idle blocks hold no more than was in use at the same time at some moment, and at least :data:`KEPT` bytes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from torchft.process_group.baby.calls import Plan

__all__ = ["KEPT", "Adopted", "Block", "HostBlock", "Pool", "map_host_block"]

KEPT = 1 << 20
"""Bytes of idle blocks that a pool keeps in any case."""

_SMALLEST = 1 << 16
_STEPS = 4  # sizes between two powers of two: at most a quarter of a block is unused


class Block(Protocol):
    """Some bytes that both sides have."""

    number: int
    data: torch.Tensor
    """The bytes, on the block's device."""

    def introduce(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """What the child has to be told in order to have it: plain data, and open files."""
        ...

    def introduced(self) -> None:
        """The child has been told."""
        ...

    def load(self, plan: Plan) -> None:
        """Copies in what the collective reads, in the order of the current stream."""
        ...

    def unload(self, plan: Plan) -> torch.Event | None:
        """Copies out what it wrote. On a device: the event after that."""
        ...

    def close(self, dead: bool) -> None:
        """It is not used any more.

        Args:
            dead: the child has ended. Otherwise it has been told to let the block go.
        """
        ...


class HostBlock:
    """A block in the computer's memory."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self._file = os.memfd_create("torchft", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, size)
            self.data = _mapped(self._file, size)
        except BaseException:
            os.close(self._file)
            raise

    def introduce(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"host": self.data.numel()}, (self._file,)

    def introduced(self) -> None:
        os.close(self._file)
        self._file = -1

    def load(self, plan: Plan) -> None:
        plan.copy_in(self.data)

    def unload(self, plan: Plan) -> torch.Event | None:
        plan.copy_out(self.data)
        return None

    def close(self, dead: bool) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.data = torch.empty(0, dtype=torch.uint8)  # the mapping ends with the last view of it


def map_host_block(file: int, size: int) -> torch.Tensor:
    """The child's side of a :class:`HostBlock`; closes the file.

    Raises:
        ValueError: the file is shorter than that.
    """
    try:
        if os.fstat(file).st_size < size:
            raise ValueError(f"a block of {size} bytes in a file of {os.fstat(file).st_size}")
        return _mapped(file, size)
    finally:
        os.close(file)


def _mapped(file: int, size: int) -> torch.Tensor:
    mapping = mmap.mmap(file, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    return torch.frombuffer(mapping, dtype=torch.uint8)


class Pool:
    """The blocks of one child on one device. From any thread.

    Args:
        make: a new block of that number and size.
    """

    def __init__(self, make: Callable[[int, int], Block]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._idle: list[Block] = []  # the longest unused first
        self._kept: list[Block] = []
        self._used = 0
        self._most_used = KEPT
        self._next = 0
        self._closed = False

    def take(self, nbytes: int) -> tuple[Block, bool, list[int]]:
        """A block of at least that size.

        Returns:
            The block; whether it is new, so that the child must be told of it; and the numbers of idle blocks that
            are gone, which the child must let go.
        """
        size = _rounded(nbytes)
        gone: list[Block] = []
        with self._lock:
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i].data.numel() == size:
                    block = self._idle.pop(i)
                    self._used += size
                    return block, False, []
            self._used += size
            self._most_used = max(self._most_used, self._used)
            left = sum(b.data.numel() for b in self._idle)
            while self._idle and left + self._used > self._most_used:
                gone.append(self._idle.pop(0))
                left -= gone[-1].data.numel()
            self._next += 1
            number = self._next
        for old in gone:
            old.close(dead=False)
        try:
            return self._make(number, size), True, [old.number for old in gone]
        except BaseException:
            with self._lock:
                self._used -= size
            raise

    def give_back(self, block: Block) -> None:
        """It is idle."""
        with self._lock:
            self._used -= block.data.numel()
            if not self._closed:
                self._idle.append(block)
                return
        block.close(dead=True)

    def keep(self, block: Block) -> None:
        """Its collective has failed: nobody uses it until the child is dead, which may still write into it."""
        with self._lock:
            self._used -= block.data.numel()
            if not self._closed:
                self._kept.append(block)
                return
        block.close(dead=True)

    def close(self) -> None:
        """The child is dead: all blocks are let go, those in use when they are given back."""
        with self._lock:
            self._closed = True
            blocks, self._idle, self._kept = [*self._idle, *self._kept], [], []
        for block in blocks:
            block.close(dead=True)


class Adopted:
    """Shared memory of the caller's that a child has mapped, too. From any thread.

    Args:
        introduce: tells the child of a block: its number, its size in bytes, and the file.
        forget: tells it that blocks are not used any more.
    """

    def __init__(self, introduce: Callable[[int, int, int], None], forget: Callable[[list[int]], None]) -> None:
        self._introduce = introduce
        self._forget = forget
        self._lock = threading.Lock()  # held while the child is told, so that nobody refers to a block before that
        self._known: dict[int, tuple[int, Any]] = {}  # numbers, by the storage's address
        self._next = 0

    def number(self, tensor: torch.Tensor) -> int | None:
        """Of the block that is the tensor's storage, below 0; None: its memory is not shared by a file."""
        storage: Any = tensor.untyped_storage()
        if tensor.device.type != "cpu" or not storage.is_shared():
            return None
        with self._lock:
            known = self._known.get(storage._cdata)
            if known is not None and not known[1].expired():
                return known[0]
            gone = [address for address, (_, reference) in self._known.items() if reference.expired()]
            if gone:
                self._forget([self._known.pop(address)[0] for address in gone])
            try:
                file, size = storage._share_fd_cpu_()  # it is shared: this moves nothing
            except RuntimeError:
                return None  # by a name in the file system
            if size == 0:
                return None
            self._next -= 1
            self._introduce(self._next, size, file)
            self._known[storage._cdata] = (self._next, _weak(storage))
            return self._next


_weak: Any = StorageWeakRef


def _rounded(nbytes: int) -> int:
    if nbytes <= _SMALLEST:
        return _SMALLEST
    step = (1 << (nbytes - 1).bit_length()) // (2 * _STEPS)
    return -(-nbytes // step) * step
