"""ProcessGroupXCCL where there is no XPU says so."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import distributed_c10d

from torchft.process_group import ProcessGroupError, ProcessGroupXCCL

_XPUS = torch.xpu.device_count() if distributed_c10d.is_xccl_available() else 0


@pytest.mark.skipif(_XPUS > 0, reason="there is an XPU: nothing is missing")
def test_without_hardware_it_says_what_is_missing() -> None:
    with pytest.raises(ProcessGroupError, match="XCCL"):
        ProcessGroupXCCL()


@pytest.mark.skipif(_XPUS < 1, reason="needs an XPU device and a torch built with XCCL")
def test_a_group_of_one_works_on_the_xpu() -> None:
    pg = ProcessGroupXCCL()
    pg.configure("127.0.0.1:1/nobody", "alone", 0, 1)
    tensor = torch.ones(1, device="xpu")
    pg.allreduce([tensor]).wait()
    assert tensor.item() == 1.0
