"""One call that averages a model's gradients over the groups, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.groups import TIMEOUT, Groups, Replica
from torchft.manager import Manager
from torchft.parallel import replicate
from torchft.process_group import FakeProcessGroupWrapper, ProcessGroupGloo
from torchft.work import CompletedWork


class Recorder:
    """A manager that notes what it is asked to average, and makes it a thousand."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.grace: list[timedelta] = []

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = None) -> Any:
        self.shapes.append(tuple(tensor.shape))
        tensor.fill_(1000)
        return CompletedWork(tensor)

    def end_with_group(self, grace: timedelta) -> None:
        self.grace.append(grace)


def recorder() -> Any:
    return Recorder()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process as one of two ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_gradients_of_a_plain_model_are_averaged_when_backward_returns(pair: Groups) -> None:
    def train(name: str, value: float) -> list[torch.Tensor]:
        replica: Replica = pair.replica(name, init_sync=False)
        with torch.no_grad():
            for p in replica.model.parameters():
                p.fill_(0.5)
        replicate(replica.model, replica.manager)
        replica.optimizer.zero_grad()
        replica.model(torch.full((1, 4), value)).sum().backward()
        found = [p.grad.clone() for p in replica.model.parameters() if p.grad is not None]
        assert replica.manager.should_commit()
        return found

    for weight, bias in pair.together(lambda: train("a", 1.0), lambda: train("b", 3.0)):
        assert weight.tolist() == [[2.0] * 4] * 3
        assert bias.tolist() == [1.0] * 3


def test_frozen_parameters_are_left_alone() -> None:
    manager, net = recorder(), layers()
    net[0].requires_grad_(False)
    replicate(net, manager)
    net(torch.ones(2, 4)).sum().backward()
    assert sorted(manager.shapes) == [(4,), (4, 4)]
    assert manager.grace == [timedelta(seconds=10)]


def test_nothing_is_sent_in_no_sync_and_all_after_it() -> None:
    manager, net = recorder(), layers()
    replicated = replicate(net, manager, end_with_group=None)
    with replicated.no_sync():
        net(torch.ones(2, 4)).sum().backward()
    assert not manager.shapes
    net(torch.ones(2, 4)).sum().backward()
    assert len(manager.shapes) == 4
    replicated.remove()
    net(torch.ones(2, 4)).sum().backward()
    assert len(manager.shapes) == 4
    assert not manager.grace


def test_a_sharded_model_sends_its_shards_and_what_is_not_sharded_by_itself(mesh: DeviceMesh) -> None:
    manager, net = recorder(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    ignored = set(net[2].parameters())
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params=ignored)
    replicate(net, manager)
    net(torch.ones(2, 4)).sum().backward()
    # Half of each linear layer's 20 numbers, as one vector a module; the norm's weight and bias.
    assert sorted(manager.shapes) == [(4,), (4,), (10,), (10,)]
    for p in net.parameters():
        local = cast(Any, p.grad).to_local() if p not in ignored else p.grad
        assert local is not None
        assert local.unique().tolist() == [1000.0]


def test_shards_are_kept_until_an_allreduce_is_required(mesh: DeviceMesh) -> None:
    manager, net = recorder(), layers()
    fully_shard(net, mesh=mesh)
    replicate(net, manager)
    cast(FSDPModule, net).set_requires_all_reduce(False)
    net(torch.ones(2, 4)).sum().backward()
    assert not manager.shapes
    assert all(cast(Any, p.grad).to_local().count_nonzero() == 0 for p in net.parameters())
    cast(FSDPModule, net).set_requires_all_reduce(True)
    net(torch.ones(2, 4)).sum().backward()
    assert len(manager.shapes) == 1


def test_an_error_on_the_way_is_the_steps_and_never_raised_out_of_backward(groups: Groups, mesh: DeviceMesh) -> None:
    pg = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=TIMEOUT))
    manager = groups.replica("a", pg=pg).manager
    net = layers()
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    replicate(net, manager)
    for fails in (True, False):
        manager.start_quorum()
        manager.wait_quorum()
        if fails:
            pg.report_future_error(RuntimeError("injected"))
        net(torch.ones(2, 4)).sum().backward()
        assert ("injected" in str(manager.errored())) == fails
        assert manager.should_commit() != fails


def test_a_state_dict_of_a_sharded_model_beside_its_forward_pass_is_refused(mesh: DeviceMesh) -> None:
    net = layers()
    fully_shard(net, mesh=mesh)
    replicate(net, recorder())
    net.state_dict()
    net(torch.ones(2, 4)).sum().backward()
    net.state_dict()  # here it is as safe as ever
    caught: list[BaseException] = []

    def read() -> None:
        try:
            net.state_dict()
        except RuntimeError as e:
            caught.append(e)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert "LiveState" in str(caught[0])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_state_dict_of_a_sharded_model_in_the_middle_of_a_pass_is_refused(mesh: DeviceMesh, where: str) -> None:
    net = layers()
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    replicate(net, recorder())

    def read(*_: object) -> None:
        with pytest.raises(RuntimeError, match="wait_quorum"):
            net.state_dict()
        refused.append(where)

    refused: list[str] = []
    if where == "forward":
        net[1].register_forward_pre_hook(read)
    else:
        net[0].register_full_backward_hook(read)
    net(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert refused == [where]
    assert len(net.state_dict()) == 4


class Wrapped(nn.parallel.DistributedDataParallel):
    def __init__(self) -> None:
        nn.Module.__init__(self)


def test_what_averages_by_itself_is_refused() -> None:
    with pytest.raises(TypeError, match="process_group=group"):
        replicate(nn.Sequential(Wrapped()), recorder())
    fsdp1 = type("FullyShardedDataParallel", (nn.Module,), {})
    with pytest.raises(TypeError, match="FSDP1"):
        replicate(fsdp1(), recorder())


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        replicate(nn.Linear(2, 2).requires_grad_(False), recorder())


def test_sparse_gradients_are_refused_by_name() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    replicate(net, recorder())
    with pytest.raises(ValueError, match="sparse=False"):
        net(torch.tensor([1])).sum().backward()


def test_a_torch_whose_fsdp_knows_no_hook_is_named(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    net = layers()
    fully_shard(net, mesh=mesh)
    monkeypatch.delattr(FSDPModule, "set_all_reduce_hook")
    with pytest.raises(RuntimeError, match=torch.__version__.replace("+", r"\+")):
        replicate(net, cast(Manager, Recorder()))
