"""Another process's memory: read as it is, refused as the system says, and never more or less than was asked for."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.forked import ForkedProgram, child
from torchft.runtime.cross_memory import address_of, can_read_others, read_memory

pytestmark = pytest.mark.skipif(not can_read_others(), reason="this system has no process_vm_readv")

HOLDER = """
import sys
from torchft.runtime.cross_memory import address_of
memory = bytearray(range(256)) * 4096
print(address_of(memoryview(memory)), flush=True)
sys.stdin.read()
"""


@contextmanager
def holder() -> Iterator[tuple[ForkedProgram, int]]:
    """A process and where it holds a megabyte: 0 to 255, again and again."""
    with child(HOLDER) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())


def test_bytes_of_another_process_arrive_however_they_are_cut() -> None:
    with holder() as (process, address):
        target = bytearray(300)
        views = [memoryview(target)[:100], memoryview(target)[100:101], memoryview(target)[101:]]
        read_memory(process.pid, [(address + 256 + 10, 250), (address + 5, 50)], views)
        assert target == bytes([*range(10, 256), *range(4), *range(5, 55)])


def test_what_is_no_memory_there_is_an_error() -> None:
    hole = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = address_of(memoryview(hole)[:1])
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    target = bytearray(2 * mmap.PAGESIZE)
    with holder() as (process, address):
        for spans in ([(0, 8)], [((1 << 64) - 8, 8)], [(address, 8), (8, 8)]):
            with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
                read_memory(process.pid, spans, [memoryview(target)[: sum(n for _, n in spans)]])
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):  # a half is there
        read_memory(os.getpid(), [(start, 2 * mmap.PAGESIZE)], [memoryview(target)])


def test_a_process_that_has_ended_is_an_error() -> None:
    with holder() as (process, address):
        process.kill()
        process.wait()
        with pytest.raises(ProcessLookupError):
            read_memory(process.pid, [(address, 8)], [memoryview(bytearray(8))])


def test_more_or_less_than_there_is_room_for_is_not_read() -> None:
    memory, target = memoryview(bytearray(b"x" * 16)), memoryview(bytearray(16))
    for spans in ([(address_of(memory), 15)], [(address_of(memory), 17)], [], [(address_of(memory), 1)] * 1025):
        with pytest.raises(OSError, match="runs of memory into 1"):
            read_memory(os.getpid(), spans, [target])
    assert bytes(target) == bytes(16)


def test_memory_that_may_not_be_written_has_no_address_to_write_to() -> None:
    with pytest.raises(TypeError):
        address_of(memoryview(b"constant"))
