"""What every process group promises of its life: configured, aborted and shut down, any number of times."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from torchft.process_group import ProcessGroup
from torchft.testing.process_group_fixtures import DEADLINE, GroupSuite

__all__ = ["Held", "LifeSuite"]

_LEAK = 24 << 20
"""Bytes by which resident memory may differ for other reasons: allocators and their caches."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    descriptors: int
    threads: int
    resident: int
    """Bytes, without the files that are mapped."""

    @classmethod
    def by(cls, pid: int | str = "self") -> Held:
        """What that process holds now."""
        folder = Path(f"/proc/{pid}")
        resident, shared = (int(n) for n in (folder / "statm").read_text().split()[1:3])
        page = os.sysconf("SC_PAGE_SIZE")
        return cls(len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")), (resident - shared) * page)

    def __add__(self, other: Held) -> Held:
        return Held(self.descriptors + other.descriptors, self.threads + other.threads, self.resident + other.resident)


class LifeSuite(GroupSuite):
    """Groups of three members."""

    def held(self, groups: list[ProcessGroup]) -> Held:
        """What this process holds, and those that the groups started."""
        return Held.by()

    def test_a_group_of_one_needs_no_store_and_leaves_tensors_as_they_are(self) -> None:
        pg = self.make()
        pg.configure("127.0.0.1:1/nobody", "alone", 0, 1)
        tensor, out = self.tensor(5), self.tensor(-1)
        pg.allreduce([tensor]).wait()
        pg.allgather_into_tensor_coalesced([out], [tensor]).wait()
        pg.barrier().wait()
        assert (tensor.item(), out.item(), pg.size(), pg.errored()) == (5.0, 5.0, 1, None)
        pg.shutdown()

    def test_a_collective_before_configure_says_so(self) -> None:
        pg = self.make()
        with pytest.raises(RuntimeError, match="not configured"):
            pg.allreduce([self.tensor(1)])
        assert pg.errored() is None

    def test_the_number_of_members_may_change(self, store: str, groups: list[ProcessGroup]) -> None:
        assert self.sum_of_ranks(groups) == [3.0] * 3
        self.meet(store, groups[:2])
        assert self.sum_of_ranks(groups[:2]) == [1.0] * 2
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_a_refused_store_is_named_at_once(self) -> None:
        pg = self.make()
        with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:1\b.*refused"):
            pg.configure("127.0.0.1:1/x", "r", 0, 2)
        assert "refused" in str(pg.errored())

    def test_nonsense_is_refused(self) -> None:
        pg = self.make()
        with pytest.raises(ValueError, match="rank 2 of 2"):
            pg.configure("127.0.0.1:1/x", "r", 2, 2)
        with pytest.raises(ValueError, match="not a store address"):
            pg.configure("nowhere", "r", 0, 2)

    def test_a_member_that_does_not_come_is_named_after_the_timeout(self, store: str) -> None:
        pg = self.make(timeout=timedelta(seconds=0.3))
        pg.configure(self.address(store), "warm", 0, 1)
        try:
            with pytest.raises(RuntimeError):
                pg.configure(self.address(store), "r", 0, 2)
            assert pg.errored() is not None
        finally:
            pg.shutdown()

    def test_abort_ends_a_configure_that_waits(self, store: str, groups: list[ProcessGroup]) -> None:
        aborting = self.abort_once_it_waits(store, groups[0])
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="aborted"):
            groups[0].configure(self.address(store), "r", 0, 2)
        assert time.monotonic() - begun < 20  # the group's timeout is 30
        aborting.join()
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_a_later_configure_ends_an_earlier_one(self, store: str, groups: list[ProcessGroup]) -> None:
        outcome: list[Exception | None] = []

        def first() -> None:
            try:
                groups[0].configure(self.address(store), "r", 0, 2)
                outcome.append(None)
            except RuntimeError as e:
                outcome.append(e)

        thread = threading.Thread(target=first)
        thread.start()
        self.meet(store, groups)
        thread.join(DEADLINE)
        while not all(pg.errored() is None and pg.size() == 3 for pg in groups):
            self.meet(store, groups)  # the thread came second
        assert self.sum_of_ranks(groups) == [3.0] * 3
        assert len(outcome) == 1

    def test_abort_fails_pending_and_later_collectives_until_the_next_configure(
        self, store: str, groups: list[ProcessGroup]
    ) -> None:
        pending = groups[0].allreduce([self.tensor(1)])
        groups[0].abort()
        begun = time.monotonic()
        with pytest.raises(RuntimeError):
            pending.wait()
        assert time.monotonic() - begun < 20  # the group's timeout is 30
        assert "aborted" in str(groups[0].errored())
        with pytest.raises(RuntimeError, match="aborted"):
            groups[0].allreduce([self.tensor(1)])
        groups[0].abort()
        self.meet(store, groups)
        assert groups[0].errored() is None
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_abort_from_another_thread_ends_a_wait(self, store: str, groups: list[ProcessGroup]) -> None:
        pending = groups[0].allreduce([self.tensor(1)])
        ended: list[Exception] = []

        def wait() -> None:
            try:
                pending.wait()
            except RuntimeError as e:
                ended.append(e)

        waiting = threading.Thread(target=wait)
        waiting.start()
        future = pending.get_future()
        groups[0].abort()
        waiting.join(20)  # the group's timeout is 30
        assert len(ended) == 1
        with pytest.raises(RuntimeError):
            future.wait()

    def test_abort_fails_a_pending_recv(self, store: str, groups: list[ProcessGroup]) -> None:
        pending = groups[0].recv([self.tensor(1)], 1, 0)
        groups[0].abort()
        with pytest.raises(RuntimeError):
            pending.wait()

    def test_set_timeout_bounds_later_collectives(self, store: str, groups: list[ProcessGroup]) -> None:
        groups[0].set_timeout(timedelta(seconds=0.2))
        try:
            with pytest.raises(RuntimeError):
                groups[0].allreduce([self.tensor(1)]).wait()
            assert groups[0].errored() is not None
            with pytest.raises(RuntimeError, match="until it is configured again"):
                groups[0].allreduce([self.tensor(1)])
        finally:
            groups[0].set_timeout(timedelta(seconds=30))

    def test_shutdown_group_can_be_configured_again(self, store: str, groups: list[ProcessGroup]) -> None:
        groups[0].shutdown()
        with pytest.raises(RuntimeError, match="not configured"):
            groups[0].allreduce([self.tensor(1)])
        self.meet(store, groups)
        assert self.sum_of_ranks(groups) == [3.0] * 3

    def test_a_hundred_reconfigurations_leak_no_descriptor_no_thread_and_no_memory(
        self, store: str, groups: list[ProcessGroup]
    ) -> None:
        for _ in range(10):
            self.meet(store, groups)
            self.sum_of_ranks(groups)
        before = self.held(groups)
        for _ in range(100):
            self.meet(store, groups)
            assert self.sum_of_ranks(groups) == [3.0] * 3
        after = self.held(groups)
        assert after.descriptors <= before.descriptors + 5
        assert after.threads <= before.threads + 5
        assert after.resident <= before.resident + _LEAK

    def test_two_groups_at_once_do_not_disturb_each_other(self, store: str, groups: list[ProcessGroup]) -> None:
        others = [self.make() for _ in range(2)]
        self.meet(store, others)

        def act(rank: int, pg: ProcessGroup) -> tuple[float, float]:
            mine, theirs = self.tensor(1.0), self.tensor(10.0)
            works = [pg.allreduce([mine])]
            if rank < 2:
                works.append(others[rank].allreduce([theirs]))
            for work in works:
                work.wait()
            return mine.item(), theirs.item()

        try:
            assert self.each(groups, act) == [(3.0, 20.0), (3.0, 20.0), (3.0, 10.0)]
            others[0].abort()
            assert self.sum_of_ranks(groups) == [3.0] * 3
            assert groups[0].errored() is None
        finally:
            for pg in others:
                pg.shutdown()
