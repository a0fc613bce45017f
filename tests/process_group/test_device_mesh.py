"""A device mesh with the replica groups as one dimension (tests/parallel trains on one)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import ReduceOp
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchft.process_group import ManagedProcessGroup, ft_init_device_mesh
from torchft.work import CompletedWork


class Manager:
    participants = 5

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Any:
        tensor.add_(1)
        return CompletedWork(tensor)

    def num_participants(self) -> int:
        return self.participants

    def participating_rank(self) -> int | None:
        return 3

    def errored(self) -> Any:
        return None

    def report_error(self, e: Exception) -> None: ...


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """This process as the third rank of four, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("names", "where"), [(("dp_replicate", "dp_shard", "tp"), 0), (("dp_shard", "dp_replicate", "tp"), 1)]
)
def test_the_groups_are_a_dimension_like_any_other(names: tuple[str, ...], where: int) -> None:
    shape = [2, 2]
    shape.insert(where, 99)
    mesh = ft_init_device_mesh(
        device_type="cpu", mesh_shape=shape, mesh_dim_names=names, replicate_dim=where, manager=Manager()
    )
    assert mesh.mesh_dim_names == names
    assert [mesh.size(i) for i in range(3)] == [1 if i == where else 2 for i in range(3)]
    assert mesh["tp"].get_local_rank() == 0
    assert mesh["dp_shard"].get_local_rank() == 1
    group = mesh.get_group("dp_replicate")
    assert isinstance(group, ManagedProcessGroup)
    assert (group.size(), mesh["dp_replicate"].get_local_rank()) == (5, 3)
    tensor = torch.zeros(2)
    dist.all_reduce(tensor, group=group)
    assert tensor.tolist() == [1.0, 1.0]


def test_sizes_and_names_that_do_not_fit_are_refused_and_the_name_stays_free() -> None:
    def make(shape: tuple[int, ...], names: tuple[str, ...], where: int) -> Any:
        return ft_init_device_mesh(
            device_type="cpu", mesh_shape=shape, mesh_dim_names=names, replicate_dim=where, manager=Manager()
        )

    with pytest.raises(ValueError, match="do not fit"):
        make((2, 2), ("dp_replicate",), 0)
    with pytest.raises(ValueError, match="do not fit"):
        make((2, 4), ("dp_replicate", "dp_shard"), 2)
    with pytest.raises(RuntimeError):
        make((2, 8), ("dp_replicate", "dp_shard"), 0)  # eight of four ranks
    assert make((2, 4), ("dp_replicate", "dp_shard"), 0).size(1) == 4
    with pytest.raises(ValueError, match="dp_replicate"):
        make((2, 4), ("dp_replicate", "dp_shard"), 0)


def test_a_managed_group_whose_quorum_failed_has_itself_for_torch() -> None:
    manager = Manager()
    manager.participants = 0
    assert ManagedProcessGroup(manager).size() == 1
