"""Wrappers: swallowing errors, faking them, and handing collectives to a Manager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ManagedProcessGroup,
    ProcessGroupDummy,
    ProcessGroupError,
    ProcessGroupGloo,
    managed,
)
from torchft.work import CompletedWork, FutureWork


def _alone(pg: Any) -> Any:
    pg.configure("127.0.0.1:1/x", "r", 0, 1)
    return pg


def test_a_fake_error_fails_the_next_work_and_only_that() -> None:
    pg = _alone(FakeProcessGroupWrapper(ProcessGroupDummy()))
    pg.report_future_error(RuntimeError("made up"))
    work = pg.allreduce([torch.ones(1)])
    with pytest.raises(RuntimeError, match="made up"):
        work.wait()
    with pytest.raises(RuntimeError, match="made up"):
        work.get_future().wait()
    assert pg.allreduce([torch.ones(1)]).wait()


def test_configure_forgets_a_fake_error() -> None:
    pg = FakeProcessGroupWrapper(ProcessGroupDummy())
    pg.report_future_error(RuntimeError("made up"))
    _alone(pg)
    assert pg.allreduce([torch.ones(1)]).wait()


def test_a_fake_configure_error_is_raised_once() -> None:
    pg = FakeProcessGroupWrapper(ProcessGroupDummy())
    pg.report_configure_error(RuntimeError("no way"))
    with pytest.raises(RuntimeError, match="no way"):
        _alone(pg)
    assert _alone(pg).size() == 1


def test_a_swallowed_error_of_a_work_completes_it_with_the_tensors() -> None:
    fake = FakeProcessGroupWrapper(ProcessGroupDummy())
    pg = _alone(ErrorSwallowingProcessGroupWrapper(fake))
    fake.report_future_error(RuntimeError("made up"))
    tensor = torch.ones(1)
    assert pg.allreduce([tensor]).wait()
    assert str(pg.error()) == "made up"
    assert pg.errored() is pg.error()


def test_a_swallowed_error_reaches_the_future_as_the_tensors() -> None:
    fake = FakeProcessGroupWrapper(ProcessGroupDummy())
    pg = _alone(ErrorSwallowingProcessGroupWrapper(fake))
    fake.report_future_error(RuntimeError("made up"))
    tensor = torch.ones(1)
    assert pg.allreduce([tensor]).get_future().wait()[0] is tensor
    assert str(pg.error()) == "made up"


def test_after_an_error_collectives_do_nothing_until_configure() -> None:
    inner = ProcessGroupGloo()
    pg = ErrorSwallowingProcessGroupWrapper(inner)
    tensor = torch.ones(1)
    assert pg.allreduce([tensor]).wait()  # not configured: raised inside, kept here
    assert isinstance(pg.error(), ProcessGroupError)
    first = pg.error()
    pg.report_error(RuntimeError("a later one"))
    assert pg.error() is first
    _alone(pg)
    assert pg.error() is None
    assert pg.allreduce([tensor]).wait()
    assert pg.error() is None


class _Manager:
    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.calls: list[Any] = []
        self.errors: list[Exception] = []

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Work:
        self.calls.append(reduce_op)
        tensor.add_(1)
        return CompletedWork(tensor)

    def num_participants(self) -> int:
        return 5

    def participating_rank(self) -> int | None:
        return self.rank

    def errored(self) -> Any:
        return self.errors[0] if self.errors else None

    def report_error(self, e: Exception) -> None:
        self.errors.append(e)


def test_a_managed_group_reduces_through_the_manager() -> None:
    manager = _Manager(3)
    pg = ManagedProcessGroup(manager)
    one, two = torch.zeros(1), torch.zeros(1)
    pg.allreduce([one], ReduceOp.AVG).wait()
    work = pg.allreduce_coalesced([one, two])
    work.wait()
    assert [v.item() for v in work.get_future().wait()] == [2.0, 1.0]
    assert [c == ReduceOp.AVG for c in manager.calls] == [True, False, False]
    assert (pg.size(), pg.rank(), pg.getBackendName()) == (5, 3, "torchft-managed")


def test_the_future_of_a_managed_allreduce_has_a_list_of_tensors() -> None:
    tensor = torch.zeros(1)
    value = ManagedProcessGroup(_Manager(0)).allreduce([tensor]).get_future().wait()
    assert [v.item() for v in value] == [1.0]


@pytest.mark.parametrize("count", [1, 2])
def test_whoever_waits_for_the_future_of_a_managed_allreduce_waits_for_the_stream_of_each(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnDevice(Future[Any]):
        """A stream waits for what is to be done on the device when this is waited for on it."""

        def wait(self) -> Any:
            waited.append(self)
            return super().wait()

    class OnDevices(_Manager):
        def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Work:
            reductions.append((OnDevice(), tensor))
            return FutureWork(reductions[-1][0])

    waited: list[Any] = []
    reductions: list[tuple[OnDevice, torch.Tensor]] = []
    on: list[torch.device] = []
    monkeypatch.setattr(managed, "Future", lambda devices: on.extend(devices) or Future())
    tensors = [torch.zeros(1, device="meta") for _ in range(count)]
    future = ManagedProcessGroup(OnDevices(0)).allreduce_coalesced(tensors).get_future()
    for reduction, tensor in reductions:
        assert not future.done()
        assert not waited
        reduction.set_result(tensor)
    assert [id(t) for t in future.value()] == [id(t) for t in tensors]
    assert waited == [reduction for reduction, _ in reductions]
    assert on == [torch.device("meta")], "whose streams wait"


def test_a_failed_allreduce_fails_the_future_of_several() -> None:
    class Failing(_Manager):
        def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Work:
            self.calls.append(Future())
            return FutureWork(self.calls[-1])

    manager = Failing(0)
    future = ManagedProcessGroup(manager).allreduce_coalesced([torch.zeros(1), torch.zeros(1)]).get_future()
    manager.calls[1].set_exception(ValueError("lost"))
    assert not future.done(), "the other one still writes to its tensor"
    manager.calls[0].set_result(None)
    with pytest.raises(RuntimeError, match="lost"):
        future.wait()


def test_a_managed_group_that_does_not_participate_has_rank_0() -> None:
    assert ManagedProcessGroup(_Manager(None)).rank() == 0


def test_a_managed_group_cannot_be_configured() -> None:
    with pytest.raises(ProcessGroupError, match="configured by its Manager"):
        _alone(ManagedProcessGroup(_Manager(0)))


def test_aborting_a_managed_group_is_reported_to_the_manager() -> None:
    pg = ManagedProcessGroup(_Manager(0))
    pg.abort()
    assert "aborted" in str(pg.errored())


def test_what_a_manager_cannot_do_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="allgather"):
        ManagedProcessGroup(_Manager(0)).allgather([[torch.zeros(1)]], [torch.zeros(1)])
