"""What the tests of :mod:`torchft.testing.process_group_suite` stand on: groups that have met, in threads.

The groups are made once for a class and configured anew by each test, as a Manager does.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch._C._distributed_c10d import ReduceOp, TCPStore

from torchft.process_group import ProcessGroup
from torchft.testing.wait import wait_until

__all__ = ["DEADLINE", "GroupSuite", "each"]

T = TypeVar("T")

DEADLINE = 60.0
"""Seconds in which whatever a test begins has ended."""
_prefixes = itertools.count()


def each(groups: list[ProcessGroup], act: Callable[[int, ProcessGroup], T]) -> list[T]:
    """Runs ``act(rank, group)`` for all groups at the same time, each in a thread.

    Raises:
        Exception: what the first of them raised, by rank.
        TimeoutError: one did not end.
    """
    results: list[Any] = [None] * len(groups)
    errors: dict[int, Exception] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = act(rank, groups[rank])
        except Exception as e:
            errors[rank] = e

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(DEADLINE)
        if thread.is_alive():
            raise TimeoutError(f"rank {rank} did not end within {DEADLINE:g} s")
    for rank in sorted(errors):
        raise errors[rank]
    return results


class GroupSuite:
    """How groups are made, and meet. A subclass says the former."""

    device: ClassVar[str] = "cpu"
    world_size: ClassVar[int] = 3

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        """A new group, not configured."""
        raise NotImplementedError

    @classmethod
    def enter(cls, rank: int) -> None:
        """Called by the thread of each rank before it does anything: to choose its device."""

    # ------------------------------------------------------------------------------------------- fixtures

    @pytest.fixture(scope="class")
    @classmethod
    def store(cls) -> Iterator[str]:
        """``host:port`` of a store that lives as long as the class's tests."""
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        yield f"127.0.0.1:{server.port}"
        del server

    @pytest.fixture(scope="class")
    @classmethod
    def idle_groups(cls) -> Iterator[list[ProcessGroup]]:
        groups = [cls.make() for _ in range(cls.world_size)]
        yield groups
        for group in groups:
            group.shutdown()

    @pytest.fixture
    def groups(self, store: str, idle_groups: list[ProcessGroup]) -> list[ProcessGroup]:
        """All members, met."""
        self.meet(store, idle_groups)
        return idle_groups

    def address(self, store: str) -> str:
        """Where no group has met yet."""
        return f"{store}/suite/{next(_prefixes)}/0"

    def each(self, groups: list[ProcessGroup], act: Callable[[int, ProcessGroup], T]) -> list[T]:
        """:func:`each`, every rank on its device."""

        def entered(rank: int, pg: ProcessGroup) -> T:
            self.enter(rank)
            return act(rank, pg)

        return each(groups, entered)

    def meet(self, store: str, groups: list[ProcessGroup]) -> None:
        address = self.address(store)
        self.each(groups, lambda rank, pg: pg.configure(address, f"replica{rank}", rank, len(groups)))

    def abort_once_it_waits(self, store: str, pg: ProcessGroup) -> threading.Thread:
        """Aborts the group, which is going to be configured, from another thread: when it has told the store where it
        is. Before that there is nothing to abort.
        """
        host, _, port = store.rpartition(":")
        client = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        before = client.num_keys()

        def abort() -> None:
            wait_until(lambda: client.num_keys() > before, DEADLINE, "that the group tells where it is")
            pg.abort()

        thread = threading.Thread(target=abort, daemon=True)
        thread.start()
        return thread

    def tensor(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def sum_of_ranks(self, groups: list[ProcessGroup]) -> list[float]:
        def act(rank: int, pg: ProcessGroup) -> float:
            tensor = self.tensor(float(rank))
            pg.allreduce([tensor], ReduceOp.SUM).wait()
            return tensor.item()

        return self.each(groups, act)
