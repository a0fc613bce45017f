"""What every process group promises of its collectives: what they compute, for which tensors, in which order.

:class:`AllreduceSuite` is for groups that reduce and nothing else (``ManagedProcessGroup``); :class:`CollectivesSuite`
for all others.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch
from torch._C._distributed_c10d import ReduceOp
from torch.futures import Future

from torchft.process_group import ProcessGroup
from torchft.testing.process_group_fixtures import GroupSuite

__all__ = ["AllreduceSuite", "CollectivesSuite"]

_SIZES = (0, 1, 7, 1023, (1 << 20) + 3)
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGER = (torch.int64, torch.int32, torch.int8, torch.uint8)


class AllreduceSuite(GroupSuite):
    """Reducing, over the groups of the fixture ``groups``."""

    def test_allreduce_sums_in_place_and_its_future_has_the_tensors(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[float]:
            tensor = self.tensor(rank, 1.0)
            work = pg.allreduce([tensor], ReduceOp.SUM)
            work.wait()
            value = work.get_future().wait()[0]
            assert torch.equal(value, tensor)
            return tensor.tolist()

        assert self.each(groups, act) == [[n * (n - 1) / 2, n]] * n

    def test_allreduce_coalesced_reduces_each_tensor(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[float]:
            tensors = [self.tensor(rank), self.tensor(10.0 * rank)]
            pg.allreduce_coalesced(tensors, ReduceOp.SUM).wait()
            return [t.item() for t in tensors]

        assert self.each(groups, act) == [[n * (n - 1) / 2, 5.0 * n * (n - 1)]] * n

    @pytest.mark.parametrize("size", _SIZES)
    def test_allreduce_takes_tensors_of_any_size(self, groups: list[ProcessGroup], size: int) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> bool:
            tensor = torch.arange(size, device=self.device) % 1000 * (rank + 1.0)
            expected = torch.arange(size, device=self.device) % 1000 * (n * (n + 1) / 2)
            pg.allreduce([tensor], ReduceOp.SUM).wait()
            return torch.equal(tensor, expected)

        assert self.each(groups, act) == [True] * n

    @pytest.mark.parametrize("dtype", [*_FLOATING, *_INTEGER], ids=lambda dtype: str(dtype)[6:])
    def test_allreduce_takes_tensors_of_any_type(self, groups: list[ProcessGroup], dtype: torch.dtype) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> torch.Tensor:
            tensor = torch.full((5,), rank + 1, dtype=dtype, device=self.device)
            pg.allreduce([tensor], ReduceOp.SUM).wait()
            return tensor.cpu()

        for tensor in self.each(groups, act):
            assert tensor.dtype == dtype
            assert tensor.tolist() == [n * (n + 1) // 2] * 5

    def test_collectives_may_be_under_way_at_the_same_time_and_waited_for_in_any_order(
        self, groups: list[ProcessGroup]
    ) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[float]:
            tensors = [torch.full((1 + 101 * i,), float(i + rank), device=self.device) for i in range(20)]
            works = [pg.allreduce([tensor], ReduceOp.SUM) for tensor in tensors]
            for work in reversed(works):
                work.wait()
            return [float(tensor[-1]) for tensor in tensors]

        assert self.each(groups, act) == [[n * i + n * (n - 1) / 2 for i in range(20)]] * n

    def test_what_follows_a_future_sees_the_outcome(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> float:
            def double(done: Future[Any]) -> torch.Tensor:
                doubled: torch.Tensor = done.value()[0] * 2
                return doubled

            work = pg.allreduce([self.tensor(1.0)], ReduceOp.SUM)
            return float(work.get_future().then(double).wait().item())

        assert self.each(groups, act) == [2.0 * n] * n


class CollectivesSuite(AllreduceSuite):
    """All collectives."""

    moved_dtypes: ClassVar[tuple[torch.dtype, ...]] = (*_FLOATING, *_INTEGER, torch.bool)
    """Types of tensors that are moved, not reduced."""

    def test_rank_and_size_are_those_of_the_configuration(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)
        assert self.each(groups, lambda _, pg: (pg.rank(), pg.size())) == [(r, n) for r in range(n)]

    def test_allreduce_takes_other_reductions(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> tuple[float, float, float]:
            tensors = [self.tensor(rank + 1) for _ in range(3)]
            for tensor, op in zip(tensors, (ReduceOp.MAX, ReduceOp.MIN, ReduceOp.PRODUCT), strict=True):
                pg.allreduce([tensor], op).wait()
            return tensors[0].item(), tensors[1].item(), tensors[2].item()

        product = float(torch.arange(1, n + 1).prod())
        assert self.each(groups, act) == [(n, 1.0, product)] * n

    def test_allgather_collects_by_rank(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[float]:
            out = [self.tensor(-1) for _ in range(n)]
            pg.allgather([out], [self.tensor(rank)]).wait()
            return [t.item() for t in out]

        assert self.each(groups, act) == [[float(r) for r in range(n)]] * n

    def test_allgather_into_tensor_coalesced_concatenates_by_rank(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[list[float]]:
            outs = [self.tensor(*[-1.0] * 2 * n), self.tensor(*[-1.0] * n)]
            pg.allgather_into_tensor_coalesced(outs, [self.tensor(rank, rank), self.tensor(10 * rank)]).wait()
            return [t.tolist() for t in outs]

        pairs = [float(r) for r in range(n) for _ in range(2)]
        assert self.each(groups, act) == [[pairs, [10.0 * r for r in range(n)]]] * n

    @pytest.mark.parametrize("size", _SIZES)
    def test_broadcast_takes_tensors_of_any_size(self, groups: list[ProcessGroup], size: int) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> bool:
            tensor = torch.arange(size, dtype=torch.float32, device=self.device) + rank
            pg.broadcast_one(tensor, n - 1).wait()
            return torch.equal(tensor, torch.arange(size, dtype=torch.float32, device=self.device) + (n - 1))

        assert self.each(groups, act) == [True] * n

    def test_tensors_of_any_type_are_moved(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[list[float]]:
            found = []
            for dtype in self.moved_dtypes:
                tensor = torch.tensor([0, 1, rank], device=self.device).to(dtype)
                pg.broadcast_one(tensor, 0).wait()
                out = [torch.zeros(2, dtype=dtype, device=self.device) for _ in range(n)]
                pg.allgather([out], [torch.tensor([1, int(rank > 0)], device=self.device).to(dtype)]).wait()
                assert tensor.dtype == out[0].dtype == dtype
                found.append([float(value) for t in (tensor, *out) for value in t.tolist()])
            return found

        moved = [0.0, 1.0, 0.0] + [float(value) for r in range(n) for value in (1, r > 0)]
        assert self.each(groups, act) == [[moved] * len(self.moved_dtypes)] * n

    def test_reduce_scatter_gives_each_rank_its_part(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> float:
            out = self.tensor(-1)
            pg.reduce_scatter([out], [[self.tensor(j + rank) for j in range(n)]]).wait()
            return out.item()

        assert self.each(groups, act) == [n * r + n * (n - 1) / 2 for r in range(n)]

    def test_reduce_scatter_tensor_coalesced_gives_each_rank_its_parts(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[list[float]]:
            outs = [self.tensor(-1), self.tensor(-1, -1)]
            pg.reduce_scatter_tensor_coalesced(outs, [self.tensor(*range(n)), self.tensor(*range(2 * n))]).wait()
            return [t.tolist() for t in outs]

        assert self.each(groups, act) == [[[n * r], [n * 2.0 * r, n * (2.0 * r + 1)]] for r in range(n)]

    def test_alltoall_base_exchanges_equal_parts(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)

        def act(rank: int, pg: ProcessGroup) -> list[float]:
            out = self.tensor(*[-1.0] * n)
            pg.alltoall_base(out, self.tensor(*(10 * rank + j for j in range(n))), [], []).wait()
            return out.tolist()

        assert self.each(groups, act) == [[10.0 * j + r for j in range(n)] for r in range(n)]

    def test_alltoall_base_exchanges_unequal_parts(self, groups: list[ProcessGroup]) -> None:
        n = len(groups)
        parts = list(range(1, n + 1))

        def act(rank: int, pg: ProcessGroup) -> list[float]:
            out = self.tensor(*[-1.0] * n * (rank + 1))
            value = self.tensor(*[float(rank)] * sum(parts))
            pg.alltoall_base(out, value, [rank + 1] * n, parts).wait()
            return out.tolist()

        assert self.each(groups, act) == [[float(j) for j in range(n) for _ in range(r + 1)] for r in range(n)]

    def test_broadcast_one_copies_the_roots_tensor(self, groups: list[ProcessGroup]) -> None:
        root = len(groups) - 1

        def act(rank: int, pg: ProcessGroup) -> float:
            tensor = self.tensor(rank)
            pg.broadcast_one(tensor, root).wait()
            return tensor.item()

        assert self.each(groups, act) == [float(root)] * len(groups)

    def test_barrier_ends_when_all_have_come(self, groups: list[ProcessGroup]) -> None:
        came: list[int] = []

        def act(rank: int, pg: ProcessGroup) -> int:
            came.append(rank)
            pg.barrier().wait()
            return len(came)

        assert self.each(groups, act) == [len(groups)] * len(groups)

    def test_send_and_recv_match_by_tag(self, groups: list[ProcessGroup]) -> None:
        if len(groups) < 2:
            pytest.skip("a group of one has nobody to send to")

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

        assert self.each(groups, act)[1] == [7.0, 8.0]

    def test_a_work_that_has_ended_says_so(self, groups: list[ProcessGroup]) -> None:
        def act(rank: int, pg: ProcessGroup) -> tuple[bool, bool]:
            work = pg.allreduce([self.tensor(1)])
            work.wait(timedelta(seconds=20))
            return work.is_completed(), work.get_future().done()

        assert self.each(groups, act) == [(True, True)] * len(groups)
