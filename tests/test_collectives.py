"""Quantized collectives over real gloo groups, one thread a member."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import AllreduceOptions, ReduceOp, TCPStore, Work
from torch.futures import Future

from torchft.collectives import allreduce_quantized, reduce_scatter_quantized, wire_bytes
from torchft.futures import future_wait
from torchft.lane import Lane, lane_of
from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ProcessGroup,
    ProcessGroupDummy,
    ProcessGroupGloo,
)
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.quantization import Format
from torchft.testing.process_group_suite import each
from torchft.work import FutureWork

DEADLINE = timedelta(seconds=60)
CPU = torch.device("cpu")
_prefixes = itertools.count()


class Recording(ProcessGroupWrapper):
    """Notes what is issued, and how many bytes of it leave this member."""

    def __init__(self, pg: ProcessGroup) -> None:
        super().__init__(pg)
        self.issued: list[str] = []
        self.sent = 0
        self.before: dict[str, Callable[[], object]] = {}

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        self.before.get(op, bool)()
        self.issued.append(op)
        if op == "alltoall_base":
            assert args[2:4] == ([], [])
            self.sent += args[1].nbytes * (self.size() - 1) // self.size()
        elif op == "allgather_into_tensor_coalesced":
            self.sent += sum(t.nbytes for t in args[1]) * (self.size() - 1)
        return super()._run(op, args, result)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield f"127.0.0.1:{server.port}"
    del server


@pytest.fixture(scope="module")
def meet(store: str) -> Iterator[Callable[[int], list[Recording]]]:
    """Makes a group of that many members."""
    made: list[Recording] = []

    def make(size: int) -> list[Recording]:
        groups = [Recording(ProcessGroupGloo(timeout=DEADLINE)) for _ in range(size)]
        made.extend(groups)
        address = f"{store}/quantized/{next(_prefixes)}"
        each(groups, lambda rank, pg: pg.configure(address, f"r{rank}", rank, size))  # type: ignore[arg-type]
        return groups

    yield make
    for group in made:
        group.shutdown()


@pytest.fixture(scope="module")
def standing(meet: Callable[[int], list[Recording]]) -> Callable[[int], list[Recording]]:
    """The group of that size which the module's tests share; only where none of its collectives fails."""
    groups: dict[int, list[Recording]] = {}
    return lambda size: groups.get(size) or groups.setdefault(size, meet(size))


def random(shape: tuple[int, ...], rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def wait(work: Work) -> Any:
    return future_wait(work.get_future(), DEADLINE)


def row_amax(tensor: torch.Tensor, row_length: int) -> torch.Tensor:
    """For each element the largest magnitude of its row, flat."""
    flat = tensor.reshape(-1).abs().double()
    return torch.cat([row.max().expand(len(row)) for row in flat.split(row_length)])


def sum_bound(inputs: list[torch.Tensor], format: Format, row_length: int, dtype: torch.dtype) -> torch.Tensor:
    """The bound of the sum in the module's docstring, and what float32 and the tensor's type round away."""
    amax = sum(row_amax(t, row_length) for t in inputs)
    magnitude = sum(t.reshape(-1).abs().double() for t in inputs)
    assert isinstance(amax, torch.Tensor)
    assert isinstance(magnitude, torch.Tensor)
    if format is Format.INT8:
        limit = amax * (2 + 1 / 254) / 254
    else:
        limit = magnitude * (2 + 1 / 16) / 16 + amax * 2.2 / 448 / 1024
    return limit * (1 + 2.0**-10) + magnitude * (2.0**-20 + torch.finfo(dtype).eps) + 1e-30


@pytest.mark.parametrize("format", list(Format))
@settings(max_examples=25)
@given(
    size=st.sampled_from([2, 3]),
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    average=st.booleans(),
    spread=st.integers(0, 6),
    seed=st.integers(0, 100),
)
def test_the_error_of_a_sum_is_within_the_bound_and_all_members_have_the_same_bits(
    standing: Callable[[int], list[Recording]],
    size: int,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    average: bool,
    spread: int,
    seed: int,
    format: Format,
) -> None:
    # Members whose numbers are of different sizes: 1, 10 ** -spread, ...
    inputs = [[(random(s, r, seed) * 10.0 ** (-spread * r / 2)).to(dtype) for s in shapes] for r in range(size)]

    def act(rank: int, pg: ProcessGroup) -> list[torch.Tensor]:
        tensors = [t.clone() for t in inputs[rank]]
        op = ReduceOp.AVG if average else ReduceOp.SUM
        work = allreduce_quantized(tensors, op, pg, format=format, row_length=32)
        value = wait(work)
        assert all(a is b for a, b in zip(value, tensors, strict=True))
        return tensors

    results = each(list(standing(size)), act)
    for others in results[1:]:
        for mine, theirs in zip(results[0], others, strict=True):
            assert torch.equal(mine, theirs)
    divisor = size if average else 1
    for i, result in enumerate(results[0]):
        if result.numel() == 0:
            continue
        members = [inputs[r][i] for r in range(size)]
        wanted = torch.stack([m.double() for m in members]).sum(0).reshape(-1)
        limit = sum_bound(members, format, 32, dtype)
        error = (result.double().reshape(-1) * divisor - wanted).abs()
        # float16 has steps of 2**-24 below its smallest normal number.
        assert (error <= limit + divisor * 2.0**-24).all(), (error - limit).max()


@pytest.mark.parametrize("pg", [ProcessGroupDummy(), "gloo"])
@pytest.mark.parametrize("divisor", [None, 4])
def test_a_group_of_one_is_exact(
    standing: Callable[[int], list[Recording]], pg: ProcessGroup | str, divisor: float | None
) -> None:
    group = standing(1)[0] if isinstance(pg, str) else pg
    tensors = [random((5, 7), 0), random((3,), 1, dtype=torch.bfloat16)]
    wanted = [t / (divisor or 1) for t in tensors]
    wait(allreduce_quantized(tensors, ReduceOp.AVG, group, divisor=divisor))
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
    output = torch.zeros(5, 7)
    wait(reduce_scatter_quantized(output, [wanted[0]], ReduceOp.SUM, group))
    assert torch.equal(output, wanted[0])


def test_strided_tensors_are_written_in_place_and_their_neighbours_are_not(
    standing: Callable[[int], list[Recording]],
) -> None:
    def act(rank: int, pg: ProcessGroup) -> None:
        base = torch.ones(6, 8).requires_grad_()
        part = base[::2, 1::3]
        options = AllreduceOptions()
        options.reduceOp = ReduceOp.SUM
        wait(allreduce_quantized([part], options, pg))
        wanted = torch.ones(6, 8)
        wanted[::2, 1::3] = 2.0
        torch.testing.assert_close(base.detach(), wanted, rtol=1e-6, atol=0)

    each(list(standing(2)), act)


def test_a_divisor_of_its_own_and_the_bytes_that_are_sent(standing: Callable[[int], list[Recording]]) -> None:
    numel, size = 300_000, 3
    groups = standing(size)
    before = groups[0].sent

    def act(rank: int, pg: ProcessGroup) -> torch.Tensor:
        tensor = torch.full((numel,), 3.0 * (rank + 1))
        wait(allreduce_quantized([tensor], ReduceOp.SUM, pg, divisor=2))
        return tensor

    for result in each(list(groups), act):
        torch.testing.assert_close(result, torch.full((numel,), 9.0), rtol=1e-6, atol=0)
    sent = groups[0].sent - before
    assert sent == wire_bytes([numel], size)
    exact = 2 * (size - 1) / size * numel * 4
    assert 0.25 < sent / exact < 0.255
    assert wire_bytes([10, 600], 4) == 2 * 3 * 1 * 516  # three rows: one for each of four members
    assert wire_bytes([10, 600], 1) == 0


@pytest.mark.parametrize("format", list(Format))
def test_reduce_scatter_gives_each_member_the_sum_of_its_inputs(
    standing: Callable[[int], list[Recording]], format: Format
) -> None:
    size = 3
    inputs = [[random((40, 31), r, seed=part) for part in range(size)] for r in range(size)]

    def act(rank: int, pg: ProcessGroup) -> torch.Tensor:
        output = torch.full((40, 31), torch.nan)
        assert wait(reduce_scatter_quantized(output, inputs[rank], ReduceOp.AVG, pg, format=format)) is output
        return output

    for part, output in enumerate(each(list(standing(size)), act)):
        members = [inputs[r][part] for r in range(size)]
        wanted = torch.stack([m.double() for m in members]).mean(0).reshape(-1)
        amax, magnitude = sum(row_amax(m, 512) for m in members), sum(m.reshape(-1).abs().double() for m in members)
        limit = amax / 254 if format is Format.INT8 else magnitude / 16 + amax / 448 / 1024
        assert ((output.double().reshape(-1) - wanted).abs() * size <= limit * 1.001).all()


def test_many_at_once_among_exact_ones_keep_one_order_on_all_members(
    standing: Callable[[int], list[Recording]],
) -> None:
    groups = standing(3)
    for group in groups:
        group.issued.clear()

    def act(rank: int, pg: ProcessGroup) -> list[torch.Tensor]:
        tensors = [torch.full((1 + 1777 * (i % 7),), float(rank + i)) for i in range(60)]
        futures = []
        for i, tensor in enumerate(tensors):
            if i % 3 == 1:
                futures.append(lane_of(pg).run(lambda t=tensor: pg.allreduce([t], ReduceOp.SUM), CPU))  # type: ignore[misc]
            else:
                futures.append(allreduce_quantized([tensor], ReduceOp.SUM, pg).get_future())
        for future in futures:
            future_wait(future, DEADLINE)
        return tensors

    for tensors in each(list(groups), act):
        for i, tensor in enumerate(tensors):
            torch.testing.assert_close(tensor, torch.full_like(tensor, 3.0 + 3 * i), rtol=1e-6, atol=0)
    assert groups[0].issued == groups[1].issued == groups[2].issued
    pair = ["alltoall_base", "allgather_into_tensor_coalesced"]
    assert groups[0].issued == [*pair, "allreduce", *pair] * 20


def test_a_call_returns_before_the_others_have_called(meet: Callable[[int], list[Recording]]) -> None:
    one, two = meet(2)
    mine = [torch.ones(1000) for _ in range(3)]
    works = [allreduce_quantized([t], ReduceOp.SUM, one) for t in mine]
    assert not any(w.is_completed() for w in works)
    assert one.issued == ["alltoall_base"]  # the others wait for their turn
    theirs = [torch.ones(1000) for _ in range(3)]
    for work in [*works, *(allreduce_quantized([t], ReduceOp.SUM, two) for t in theirs)]:
        wait(work)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert mine[0][0] == pytest.approx(2.0)


def test_an_abort_between_the_steps_fails_the_work_once_and_leaves_the_tensors(
    meet: Callable[[int], list[Recording]],
) -> None:
    one, two = meet(2)
    gathering = threading.Event()
    one.before["allgather_into_tensor_coalesced"] = gathering.set
    tensor = torch.ones(5000)
    work = allreduce_quantized([tensor], ReduceOp.SUM, one)
    later = allreduce_quantized([torch.ones(3)], ReduceOp.SUM, one)
    ends: list[object] = []
    work.get_future().add_done_callback(lambda _: ends.append("end"))
    # The other member takes part in the first step only.
    received = torch.empty((10, 516), dtype=torch.uint8)
    two.alltoall_base(received, torch.zeros_like(received), [], []).wait()
    assert gathering.wait(60)
    assert not work.is_completed()
    one.abort()
    for failed in (work, later):
        with pytest.raises(RuntimeError):
            wait(failed)
    assert torch.equal(tensor, torch.ones(5000))
    assert ends == ["end"]
    with pytest.raises(RuntimeError, match="abort"):
        wait(allreduce_quantized([tensor], ReduceOp.SUM, one))


def test_an_abort_in_the_first_step_fails_everything_that_waits(meet: Callable[[int], list[Recording]]) -> None:
    one, _ = meet(2)
    works = [allreduce_quantized([torch.ones(9)], ReduceOp.SUM, one) for _ in range(500)]  # no recursion
    output = torch.zeros(9)
    works.append(reduce_scatter_quantized(output, [torch.ones(9)] * 2, ReduceOp.SUM, one))
    one.abort()
    with pytest.raises(RuntimeError):  # as gloo says it
        wait(works[0])
    for work in works[1:]:
        with pytest.raises(RuntimeError, match="abort"):
            wait(work)
    assert one.issued == ["alltoall_base"] * 501  # each was tried in its turn, and refused
    assert output.count_nonzero() == 0


@pytest.mark.parametrize("step", ["alltoall_base", "allgather_into_tensor_coalesced"])
@pytest.mark.parametrize("swallow", [False, True])
def test_an_error_of_either_step_is_the_works(meet: Callable[[int], list[Recording]], step: str, swallow: bool) -> None:
    one, two = meet(2)
    fake = FakeProcessGroupWrapper(one)
    recording = Recording(fake)
    recording.before[step] = lambda: fake.report_future_error(RuntimeError("made up"))
    pg: ProcessGroup = ErrorSwallowingProcessGroupWrapper(recording) if swallow else recording
    tensor = torch.ones(100)
    work = allreduce_quantized([tensor], ReduceOp.SUM, pg)
    other = allreduce_quantized([torch.ones(100)], ReduceOp.SUM, two)
    with pytest.raises(RuntimeError, match="made up"):
        wait(work)
    assert torch.equal(tensor, torch.ones(100))
    one.abort()
    two.abort()
    if step == "alltoall_base":
        with pytest.raises(RuntimeError):
            wait(other)


_DROPPED = """
import threading
from datetime import timedelta
import torch
from torch.distributed import ReduceOp, TCPStore
from torchft.collectives import allreduce_quantized
from torchft.process_group import ProcessGroupGloo

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def act(rank, turn):
    pg = ProcessGroupGloo(timeout=timedelta(seconds=20))
    pg.configure(f"127.0.0.1:{store.port}/{turn}", str(rank), rank, 2)
    allreduce_quantized([torch.ones(100_000)], ReduceOp.SUM, pg).wait()

for turn in range(10):
    members = [threading.Thread(target=act, args=(rank, turn)) for rank in range(2)]
    [m.start() for m in members]
    [m.join() for m in members]
print("end")
"""


def test_a_group_may_be_dropped_as_soon_as_its_work_is_done() -> None:
    done = subprocess.run([sys.executable, "-c", _DROPPED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_what_is_not_possible_is_refused_at_once() -> None:
    pg = ProcessGroupDummy()
    with pytest.raises(ValueError, match="SUM or AVG"):
        allreduce_quantized([torch.ones(2)], ReduceOp.MAX, pg)
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        allreduce_quantized([torch.arange(2)], ReduceOp.SUM, pg)
    with pytest.raises(ValueError, match="1 inputs of shape"):
        reduce_scatter_quantized(torch.ones(2), [torch.ones(2)] * 2, ReduceOp.SUM, pg)
    assert allreduce_quantized([], ReduceOp.SUM, pg).is_completed()
    assert allreduce_quantized([torch.ones(0)], ReduceOp.SUM, pg).is_completed()


def test_a_lane_issues_in_the_order_of_asking_and_nothing_after_it_was_closed() -> None:
    lane = Lane()
    issued: list[int] = []

    def call(i: int) -> Callable[[], Work]:
        def issue() -> Work:
            issued.append(i)
            future: Future[int] = Future()
            future.set_result(i)
            return FutureWork(future)

        return issue

    assert future_wait(lane.run(call(0), CPU), DEADLINE) == 0
    lane.enter(lambda: None)  # takes the lane
    waiting = [lane.run(call(i), CPU) for i in range(1, 2000)]
    assert issued == [0]
    lane.leave()
    assert issued == list(range(2000))
    assert [f.value() for f in waiting] == list(range(1, 2000))

    lane.enter(lambda: None)
    late = lane.run(call(-1), CPU)
    lane.close()
    lane.leave()
    with pytest.raises(RuntimeError, match="has ended"):
        future_wait(late, DEADLINE)
    with pytest.raises(RuntimeError, match="has ended"):
        lane.run(call(-1), CPU)
    assert -1 not in issued
