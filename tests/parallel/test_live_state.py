"""The state of a sharded model and its optimizer: the live shards, read beside a forward pass, and healed into a
joiner whose optimizer has no state yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.groups import TIMEOUT, Groups
from torchft.checkpointing import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport
from torchft.optim import OptimizerWrapper
from torchft.parallel import LiveState
from torchft.process_group import ProcessGroupGloo

WIDTH = 256


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process as the second rank of two, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    finally:
        dist.destroy_process_group()


def sharded(mesh: DeviceMesh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    fully_shard(net, mesh=mesh)
    return net


def test_within_a_forward_pass_it_still_has_the_shards(mesh: DeviceMesh) -> None:
    net = sharded(mesh)
    state = LiveState(net, torch.optim.SGD(net.parameters()))
    parameters = dict(net.named_parameters())
    within: list[dict[str, Any]] = []

    def look(*_: object) -> None:
        assert not isinstance(net[0].weight, DTensor), "whole by now"
        within.append(state.state_dict()["model"])

    net[1].register_forward_pre_hook(look)
    net(torch.ones(2, WIDTH))
    (found,) = within
    assert set(found) == {*parameters, "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        assert found[name].to_local().data_ptr() == parameter.to_local().data_ptr()
        assert not found[name].requires_grad


def test_others_are_part_of_it_by_name() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = LiveState(net, optimizer, schedule=schedule)
    optimizer.step()
    schedule.step()
    saved = state.state_dict()
    assert set(saved) == {"model", "optimizer", "schedule"}
    fresh = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    other_schedule = torch.optim.lr_scheduler.StepLR(fresh, 1)
    other = LiveState(nn.Linear(2, 2), fresh, schedule=other_schedule)
    other.load_state_dict(saved)
    assert other_schedule.last_epoch == 1
    assert torch.equal(other.state_dict()["model"]["weight"], net.weight)


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}


def test_extra_state_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="_extra_state"):
        LiveState(nn.Sequential(WithExtra(2, 2)))


Functions = tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], object]]


def live(net: nn.Module, optimizer: torch.optim.Optimizer) -> Functions:
    state = LiveState(net, optimizer)
    return state.state_dict, state.load_state_dict


def by_checkpoint_functions(net: nn.Module, optimizer: torch.optim.Optimizer) -> Functions:
    def save() -> dict[str, Any]:
        model, state = get_state_dict(net, optimizer)
        return {"model": model, "optimizer": state}

    def load(state: dict[str, Any]) -> None:
        set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    return save, load


@pytest.mark.parametrize(
    ("functions", "on_training_thread"),
    [(live, False), (by_checkpoint_functions, False), (by_checkpoint_functions, True)],
    ids=["live", "torch.distributed.checkpoint", "torch.distributed.checkpoint on the training thread"],
)
@pytest.mark.parametrize("transport", ["http", "pg"])
def test_shards_heal_into_a_joiner_that_has_never_stepped(
    groups: Groups, mesh: DeviceMesh, transport: str, functions: Callable[..., Functions], on_training_thread: bool
) -> None:
    class Group:
        def __init__(self, name: str, seed: int) -> None:
            self.net = sharded(mesh, seed)
            self.inner = torch.optim.AdamW(self.net.parameters(), lr=0.1)
            self.save, load = functions(self.net, self.inner)
            pg = ProcessGroupGloo(timeout=TIMEOUT)

            def into() -> dict[str, Any]:
                return {} if on_training_thread else {"user": {"default": self.save()}}

            self.shards = {n: p.to_local().data_ptr() for n, p in self.net.named_parameters()}  # type: ignore[attr-defined]
            self.manager = groups.replica(
                name,
                pg=pg,
                state_dict=None,
                load_state_dict=None,
                use_async_quorum=on_training_thread,  # else they must not be called beside the forward pass
                checkpoint_transport=PGTransport(pg, TIMEOUT, "cpu", state_dict=into)
                if transport == "pg"
                else HTTPTransport(TIMEOUT, state_dict=into, snapshot="lock"),
            ).manager
            self.manager.register_state_dict_fn("default", load, self.save, on_training_thread=on_training_thread)
            self.optimizer = OptimizerWrapper(self.manager, self.inner)

        def step(self) -> None:
            """The same gradients in all groups, by hand: the imagined collectives compute nothing."""
            self.optimizer.zero_grad()
            self.manager.allreduce(torch.zeros(1)).wait()  # nobody commits before the joiner is healed
            for i, p in enumerate(self.net.parameters()):
                p.grad = torch.full_like(p, i + 1.0)
            self.optimizer.step()

        def tensors(self) -> dict[str, torch.Tensor]:
            state = self.inner.state_dict()["state"]
            found = {f"{i}/{k}": v for i, s in state.items() for k, v in s.items()} | dict(self.net.state_dict())
            return {k: v.to_local() if isinstance(v, DTensor) else v for k, v in found.items()}

    a = Group("a", 1)
    for _ in range(3):
        a.step()
    b = Group("b", 2)
    groups.train_together((a.manager, a.step), (b.manager, b.step))
    assert b.manager.errored() is None
    theirs, mine = a.tensors(), b.tensors()
    assert theirs.keys() == mine.keys()
    assert len(mine) == 4 + 3 + 4 * 3
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    for name, parameter in b.net.named_parameters():
        assert parameter.to_local().data_ptr() == b.shards[name], "received where it was"  # type: ignore[attr-defined]
