"""ProcessGroupXCCL and its baby keep the suite's promises where there are XPUs, and say so where there are none."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

import pytest
import torch
from torch.distributed import distributed_c10d

from torchft.process_group import ProcessGroup, ProcessGroupBabyXCCL, ProcessGroupError, ProcessGroupXCCL
from torchft.testing.process_group_suite import CollectivesSuite

_XPUS = torch.xpu.device_count() if distributed_c10d.is_xccl_available() else 0
_two = pytest.mark.skipif(_XPUS < 2, reason="needs two XPU devices and a torch built with XCCL")


class _OnXpus:
    device: ClassVar[str] = "xpu"
    world_size: ClassVar[int] = min(_XPUS, 3)

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupXCCL(timeout=timeout)

    @classmethod
    def enter(cls, rank: int) -> None:
        torch.xpu.set_device(rank)


@_two
class TestCollectives(_OnXpus, CollectivesSuite):
    pass


@_two
class TestBabyCollectives(_OnXpus, CollectivesSuite):
    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupBabyXCCL(timeout=timeout)


@pytest.mark.skipif(_XPUS > 0, reason="there is an XPU: nothing is missing")
@pytest.mark.parametrize("kind", [ProcessGroupXCCL, ProcessGroupBabyXCCL])
def test_without_hardware_it_says_what_is_missing(kind: type[ProcessGroup]) -> None:
    with pytest.raises(ProcessGroupError, match=f"{kind.__name__} needs .*XCCL"):
        kind()


@pytest.mark.skipif(_XPUS < 1, reason="needs an XPU device and a torch built with XCCL")
def test_a_group_of_one_works_on_the_xpu() -> None:
    pg = ProcessGroupXCCL()
    pg.configure("127.0.0.1:1/nobody", "alone", 0, 1)
    tensor = torch.ones(1, device="xpu")
    pg.allreduce([tensor]).wait()
    assert tensor.item() == 1.0
