"""DTensor parameters: each rank of a group synchronises its own shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.local_sgd.job import imagined, inner_step, uneven_model
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.local_sgd.parameters import local_shard
from torchft.manager import Manager

RANK, RANKS = 1, 2


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process as the second rank of two, of which there is no first: shards are local, nothing communicates."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,))
    finally:
        dist.destroy_process_group()


def shard_rows(model: nn.Sequential, mesh: DeviceMesh) -> None:
    for layer in model:
        for name, p in list(layer.named_parameters()):
            whole = p.detach()
            mine = whole.chunk(RANKS)[RANK].clone()  # 5, 7, 3 rows: uneven
            sharded = DTensor.from_local(
                mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            setattr(layer, name, nn.Parameter(sharded))


@pytest.mark.parametrize("algorithm", ["LocalSGD", "DiLoCo", "DiLoCo in buckets"])
def test_shards_end_as_the_same_rows_of_a_whole_model(mesh: DeviceMesh, algorithm: str) -> None:
    def run(manager: Manager, group: int, sharded: bool) -> list[torch.Tensor]:
        model = uneven_model(dtype=torch.float64)
        if sharded:
            shard_rows(model, mesh)
        inner = torch.optim.SGD(model.parameters(), lr=0.2)
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        loop: LocalSGD | DiLoCo
        if algorithm == "LocalSGD":
            loop = LocalSGD(manager, model, inner, 2)
        else:
            loop = DiLoCo(
                manager,
                list(model),
                inner,
                outer,
                6,
                use_bucketization=algorithm != "DiLoCo",
                fragment_sync_delay=1,
                fragment_update_alpha=0.25,
            )
        with loop:
            for step in range(18):
                inner_step(model, inner, group, step)
        assert all(isinstance(p, DTensor) == sharded for p in model.parameters())
        return [local_shard(p) for p in model.parameters()]

    whole = imagined(2, lambda manager, group: run(manager, group, sharded=False))
    shards = imagined(2, lambda manager, group: run(manager, group, sharded=True))
    for group in range(2):
        for w, s in zip(whole[group], shards[group], strict=True):
            assert s.shape[0] < w.shape[0]
            torch.testing.assert_close(s, w.chunk(RANKS)[RANK], rtol=1e-12, atol=1e-12)
