"""ProcessGroupDummy: enough of a group for torch's DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchft.process_group import ProcessGroupDummy, ProcessGroupError


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def test_torch_ddp_with_unused_parameters_and_a_hook_trains_on_it() -> None:
    model = _Branches()
    plain = _Branches()
    plain.load_state_dict(model.state_dict())
    seen: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        seen.append(bucket.buffer().numel())
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    ddp = DistributedDataParallel(model, process_group=ProcessGroupDummy(0, 1), find_unused_parameters=True)
    ddp.register_comm_hook(None, hook)
    for _ in range(2):
        ddp.zero_grad()
        plain.zero_grad()
        ddp(torch.ones(4, 3)).sum().backward()
        plain(torch.ones(4, 3)).sum().backward()
        assert model.used.weight.grad is not None
        assert plain.used.weight.grad is not None
        torch.testing.assert_close(model.used.weight.grad, 2 * plain.used.weight.grad)
    assert seen


def test_torch_ddp_without_a_hook_leaves_gradients_as_they_are() -> None:
    model = nn.Linear(2, 1, bias=False)
    ddp = DistributedDataParallel(model, process_group=ProcessGroupDummy(0, 1))
    ddp(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0, 4.0]]


def test_every_collective_of_one_is_a_copy() -> None:
    pg = ProcessGroupDummy(0, 1)
    value = torch.tensor([1.0, 2.0])

    def fresh() -> torch.Tensor:
        return torch.zeros(2)

    out = [fresh() for _ in range(6)]
    pg.allgather([[out[0]]], [value]).wait()
    pg.allgather_into_tensor_coalesced([out[1]], [value]).wait()
    pg.reduce_scatter([out[2]], [[value]]).wait()
    pg.reduce_scatter_tensor_coalesced([out[3]], [value]).wait()
    pg.alltoall_base(out[4], value, [], []).wait()
    pg._allgather_base(out[5], value).wait()
    for tensor in out:
        assert tensor.tolist() == [1.0, 2.0]
    assert pg.allreduce([value]).get_future().wait()[0] is value
    assert pg.broadcast_one(value, 0).wait()
    assert pg.barrier().wait()
    assert pg.size() == 1
    assert pg.rank() == 0


def test_nobody_to_send_to_is_an_error() -> None:
    with pytest.raises(ProcessGroupError, match="nobody"):
        ProcessGroupDummy().send([torch.zeros(1)], 0, 0)


def test_more_than_one_member_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 1 of 2"):
        ProcessGroupDummy(1, 2)
