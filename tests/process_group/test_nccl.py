"""ProcessGroupNCCL and its baby keep the suite's promises where there are GPUs, and say so where there are none.

The suite needs a GPU for each member: two for what collectives compute, three for a group's life.
"""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from torchft.process_group import ProcessGroup, ProcessGroupBabyNCCL, ProcessGroupError, ProcessGroupNCCL
from torchft.testing.process_group_suite import CollectivesSuite, LifeSuite

_GPUS = torch.cuda.device_count() if dist.is_nccl_available() else 0
_one = pytest.mark.skipif(_GPUS < 1, reason="needs a CUDA device and a torch built with NCCL")
_two = pytest.mark.skipif(_GPUS < 2, reason="needs two CUDA devices: NCCL takes one member a device")
_three = pytest.mark.skipif(_GPUS < 3, reason="needs three CUDA devices: NCCL takes one member a device")


class _OnGpus:
    device: ClassVar[str] = "cuda"

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupNCCL(timeout=timeout)

    @classmethod
    def enter(cls, rank: int) -> None:
        torch.cuda.set_device(rank)


class _Baby(_OnGpus):
    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupBabyNCCL(timeout=timeout)


@_two
class TestCollectives(_OnGpus, CollectivesSuite):
    world_size: ClassVar[int] = min(_GPUS, 3)


@_three
class TestLife(_OnGpus, LifeSuite):
    pass


@_two
class TestBabyCollectives(_Baby, CollectivesSuite):
    world_size: ClassVar[int] = min(_GPUS, 3)


@_three
class TestBabyLife(_Baby, LifeSuite):
    pass


@pytest.mark.skipif(_GPUS > 0, reason="there is a GPU: nothing is missing")
@pytest.mark.parametrize("kind", [ProcessGroupNCCL, ProcessGroupBabyNCCL])
def test_without_hardware_it_says_what_is_missing(kind: type[ProcessGroup]) -> None:
    with pytest.raises(ProcessGroupError, match=f"{kind.__name__} needs .*NCCL"):
        kind()


@_one
@pytest.mark.parametrize("kind", [ProcessGroupNCCL, ProcessGroupBabyNCCL])
def test_a_group_of_one_works_on_the_gpu(kind: type[ProcessGroup]) -> None:
    pg = kind()
    pg.configure("127.0.0.1:1/nobody", "alone", 0, 1)
    tensor = torch.ones(1, device="cuda")
    pg.allreduce([tensor]).wait()
    assert tensor.item() == 1.0
    pg.shutdown()
