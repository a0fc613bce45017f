"""What every process group promises, as tests: subclass :class:`ProcessGroupSuite` in a test module.

Members live in threads of the test's process where that shows the promise, and in processes of their own where
one has to die or to stand still. The groups of the threads are made once for a class and configured anew by each
test, as a Manager does.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch._C._distributed_c10d import ReduceOp, TCPStore

from torchft.process_group import ProcessGroup
from torchft.testing.process_group_member import Member

__all__ = ["ProcessGroupSuite", "each"]

T = TypeVar("T")

_DEADLINE = 60.0
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
        thread.join(_DEADLINE)
        if thread.is_alive():
            raise TimeoutError(f"rank {rank} did not end within {_DEADLINE:g} s")
    for rank in sorted(errors):
        raise errors[rank]
    return results


class ProcessGroupSuite:
    """The promises. A subclass says how a group is made."""

    factory: ClassVar[str] = ""
    """``module:Class`` of the group, for members in processes of their own."""
    device: ClassVar[str] = "cpu"
    world_size: ClassVar[int] = 3

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        """A new group, not configured."""
        raise NotImplementedError

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

    @pytest.fixture
    def members(self) -> Iterator[Callable[..., list[Member]]]:
        """Makes members in processes of their own."""
        with ExitStack() as stack:
            yield lambda n, **options: [stack.enter_context(Member(self.factory, **options)) for _ in range(n)]

    def address(self, store: str) -> str:
        """Where no group has met yet."""
        return f"{store}/suite/{next(_prefixes)}/0"

    def meet(self, store: str, groups: list[ProcessGroup]) -> None:
        address = self.address(store)
        each(groups, lambda rank, pg: pg.configure(address, f"replica{rank}", rank, len(groups)))

    def meet_members(self, store: str, members: list[Member]) -> None:
        address = self.address(store)
        for rank, member in enumerate(members):
            member.tell("configure", store_addr=address, rank=rank, world_size=len(members))
        for member in members:
            assert member.answer()["error"] is None

    def tensor(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def sum_of_ranks(self, groups: list[ProcessGroup]) -> list[float]:
        def act(rank: int, pg: ProcessGroup) -> float:
            tensor = self.tensor(float(rank))
            pg.allreduce([tensor], ReduceOp.SUM).wait()
            return tensor.item()

        return each(groups, act)

    # ---------------------------------------------------------------------------------------- collectives

    def test_rank_and_size_are_those_of_the_configuration(self, groups: list[ProcessGroup]) -> None:
        assert each(groups, lambda _, pg: (pg.rank(), pg.size())) == [(r, 3) for r in range(3)]

    def test_allreduce_sums_in_place_and_its_future_has_the_tensors(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[float]:
            tensor = self.tensor(rank, 1.0)
            work = pg.allreduce([tensor], ReduceOp.SUM)
            work.wait()
            value = work.get_future().wait()[0]
            assert torch.equal(value, tensor)
            return tensor.tolist()

        assert each(groups, act) == [[3.0, 3.0]] * 3

    def test_allreduce_takes_other_reductions(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> float:
            tensor = self.tensor(rank)
            pg.allreduce([tensor], ReduceOp.MAX).wait()
            return tensor.item()

        assert each(groups, act) == [2.0] * 3

    def test_allreduce_coalesced_reduces_each_tensor(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[float]:
            tensors = [self.tensor(rank), self.tensor(10.0 * rank)]
            pg.allreduce_coalesced(tensors).wait()
            return [t.item() for t in tensors]

        assert each(groups, act) == [[3.0, 30.0]] * 3

    def test_allgather_collects_by_rank(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[float]:
            out = [self.tensor(-1) for _ in range(3)]
            pg.allgather([out], [self.tensor(rank)]).wait()
            return [t.item() for t in out]

        assert each(groups, act) == [[0.0, 1.0, 2.0]] * 3

    def test_allgather_into_tensor_coalesced_concatenates_by_rank(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[list[float]]:
            outs = [self.tensor(*[-1.0] * 6), self.tensor(*[-1.0] * 3)]
            pg.allgather_into_tensor_coalesced(outs, [self.tensor(rank, rank), self.tensor(10 * rank)]).wait()
            return [t.tolist() for t in outs]

        assert each(groups, act) == [[[0.0, 0.0, 1.0, 1.0, 2.0, 2.0], [0.0, 10.0, 20.0]]] * 3

    def test_reduce_scatter_gives_each_rank_its_part(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> float:
            out = self.tensor(-1)
            pg.reduce_scatter([out], [[self.tensor(j + rank) for j in range(3)]]).wait()
            return out.item()

        assert each(groups, act) == [3.0, 6.0, 9.0]

    def test_reduce_scatter_tensor_coalesced_gives_each_rank_its_parts(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[list[float]]:
            outs = [self.tensor(-1), self.tensor(-1, -1)]
            pg.reduce_scatter_tensor_coalesced(outs, [self.tensor(0, 1, 2), self.tensor(*range(6))]).wait()
            return [t.tolist() for t in outs]

        assert each(groups, act) == [[[0.0], [0.0, 3.0]], [[3.0], [6.0, 9.0]], [[6.0], [12.0, 15.0]]]

    def test_alltoall_base_exchanges_equal_parts(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[float]:
            out = self.tensor(-1, -1, -1)
            pg.alltoall_base(out, self.tensor(*(10 * rank + j for j in range(3))), [], []).wait()
            return out.tolist()

        assert each(groups, act) == [[0.0, 10.0, 20.0], [1.0, 11.0, 21.0], [2.0, 12.0, 22.0]]

    def test_alltoall_base_exchanges_unequal_parts(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[float]:
            out = self.tensor(*[-1.0] * 3 * (rank + 1))
            value = self.tensor(*[float(rank)] * 6)
            pg.alltoall_base(out, value, [rank + 1] * 3, [1, 2, 3]).wait()
            return out.tolist()

        assert each(groups, act) == [sorted([0.0, 1.0, 2.0] * n) for n in (1, 2, 3)]

    def test_broadcast_one_copies_the_roots_tensor(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> float:
            tensor = self.tensor(rank)
            pg.broadcast_one(tensor, 1).wait()
            return tensor.item()

        assert each(groups, act) == [1.0] * 3

    def test_barrier_ends_when_all_have_come(self, groups: list[ProcessGroup]) -> None:
        came: list[int] = []

        def act(rank: int, pg: ProcessGroup) -> int:
            came.append(rank)
            pg.barrier().wait()
            return len(came)

        assert each(groups, act) == [3] * 3

    def test_send_and_recv_match_by_tag(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> list[float]:
            if rank == 0:
                for work in [pg.send([self.tensor(7)], 1, 3), pg.send([self.tensor(8)], 1, 4)]:
                    work.wait()
            if rank != 1:
                return []
            first, second = self.tensor(-1), self.tensor(-1)
            works = [pg.recv([second], 0, 4), pg.recv([first], 0, 3)]
            assert works[0].get_future().wait()[0] is second
            works[1].wait()
            return [first.item(), second.item()]

        assert each(groups, act)[1] == [7.0, 8.0]

    # ----------------------------------------------------------------------------------------------- life

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
        timer = threading.Timer(0.2, groups[0].abort)
        timer.start()
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="aborted"):
            groups[0].configure(self.address(store), "r", 0, 2)
        assert time.monotonic() - begun < 20  # the group's timeout is 30
        timer.join()
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
        thread.join(_DEADLINE)
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

    def test_a_hundred_reconfigurations_leak_no_descriptor_and_no_thread(
        self, store: str, groups: list[ProcessGroup]
    ) -> None:
        def held() -> tuple[int, int]:
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        for _ in range(5):
            self.meet(store, groups)
            self.sum_of_ranks(groups)
        before = held()
        for _ in range(100):
            self.meet(store, groups)
            assert self.sum_of_ranks(groups) == [3.0] * 3
        after = held()
        assert after[0] <= before[0] + 5
        assert after[1] <= before[1] + 5

    # ------------------------------------------------------------------------ members that die or stand still

    def test_when_a_member_dies_the_survivors_collective_fails_at_once(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        pair[0].tell("allreduce")
        pair[1].kill()
        answer = pair[0].answer()
        assert answer["error"] is not None
        assert answer["seconds"] < 20  # the group's timeout is 30
        assert pair[0].ask("errored")["value"] is not None

    def test_a_member_that_is_killed_while_its_data_workers_live_on_is_seen_at_once(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        workers = pair[1].ask("fork_data_workers")["value"]
        for member in pair:
            member.tell("allreduce")
        assert [member.answer()["value"] for member in pair] == [2.0, 2.0]  # forking cost it nothing
        assert len(workers) == 2
        try:
            pair[0].tell("allreduce")
            begun = time.monotonic()
            pair[1].kill()
            assert pair[0].answer()["error"] is not None
            assert time.monotonic() - begun < 1
            for worker in workers:
                os.kill(worker, 0)  # it lives
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)

    def test_a_member_that_stops_while_it_meets_the_others_does_not_hold_up_an_abort(
        self, store: str, members: Callable[..., list[Member]], groups: list[ProcessGroup]
    ) -> None:
        stopped, other = members(2)
        address = self.address(store)
        stopped.tell("configure_and_stop", store_addr=address, rank=1, world_size=2)
        stopped.wait_until_stopped()
        timer = threading.Timer(0.2, groups[0].abort)
        timer.start()
        begun = time.monotonic()

        def meet_and_reduce() -> None:
            groups[0].configure(address, "r", 0, 2)  # where our side makes the connection, the other need not answer
            groups[0].allreduce([self.tensor(1)]).wait()

        with pytest.raises(RuntimeError):
            meet_and_reduce()
        assert time.monotonic() - begun < 2  # the group's timeout is 30
        assert "aborted" in str(groups[0].errored())
        timer.join()
        address = self.address(store)
        other.tell("configure", store_addr=address, rank=1, world_size=2)
        groups[0].configure(address, "r", 0, 2)
        assert other.answer()["error"] is None

    def test_a_survivor_that_aborts_lets_go_of_the_third(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        trio = members(3)
        self.meet_members(store, trio)
        for survivor in trio[:2]:
            survivor.tell("allreduce_and_abort_on_error")
        trio[2].kill()
        for survivor in trio[:2]:
            answer = survivor.answer()
            assert answer["error"] is not None
            assert answer["seconds"] < 20
        self.meet_members(store, trio[:2])
        for survivor in trio[:2]:
            survivor.tell("allreduce")
        assert [survivor.answer()["value"] for survivor in trio[:2]] == [2.0, 2.0]

    def test_abort_ends_a_collective_that_waits_for_a_stopped_member(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = members(2)
        self.meet_members(store, pair)
        pair[1].stop()
        answer = pair[0].ask("allreduce_aborted_after", seconds=0.2)
        assert answer["error"] is not None
        assert answer["seconds"] < 20
        assert "aborted" in pair[0].ask("errored")["value"]

    def test_a_survivor_that_aborts_lets_go_of_one_that_waits_for_it(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        trio = members(3)
        self.meet_members(store, trio)
        trio[1].tell("recv", source=0)
        trio[0].tell("recv_and_abort_on_error", source=2)
        trio[2].kill()
        for survivor in trio[:2]:
            answer = survivor.answer()
            assert answer["error"] is not None
            assert answer["seconds"] < 20  # the group's timeout is 30

    def test_a_process_that_exits_does_not_wait_for_a_stopped_member(
        self, store: str, members: Callable[..., list[Member]]
    ) -> None:
        pair = [*members(1, timeout=300.0, program=True), *members(1, timeout=300.0)]
        self.meet_members(store, pair)
        pair[1].stop()
        pair[0].tell("issue_and_exit")
        assert pair[0].wait(deadline=60) == 7
