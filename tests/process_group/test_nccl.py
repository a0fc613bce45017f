"""ProcessGroupNCCL keeps the suite's promises where there are GPUs, and says so where there are none."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from torchft.process_group import ProcessGroupError, ProcessGroupNCCL
from torchft.testing.process_group_suite import each

_GPUS = torch.cuda.device_count() if dist.is_nccl_available() else 0


@pytest.mark.skipif(_GPUS > 0, reason="there is a GPU: nothing is missing")
def test_without_hardware_it_says_what_is_missing() -> None:
    with pytest.raises(ProcessGroupError, match="NCCL"):
        ProcessGroupNCCL()


@pytest.mark.skipif(_GPUS < 1, reason="needs a CUDA device and a torch built with NCCL")
def test_a_group_of_one_works_on_the_gpu() -> None:
    pg = ProcessGroupNCCL(timeout=timedelta(seconds=30))
    pg.configure("127.0.0.1:1/nobody", "alone", 0, 1)
    tensor = torch.ones(1, device="cuda")
    pg.allreduce([tensor]).wait()
    assert tensor.item() == 1.0
    pg.shutdown()


@pytest.mark.skipif(_GPUS < 2, reason="needs two CUDA devices: NCCL takes one member a device")
def test_members_reduce_abort_and_meet_again() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups = [ProcessGroupNCCL(timeout=timedelta(seconds=30)) for _ in range(2)]

    def act(rank: int, prefix: str) -> float:
        torch.cuda.set_device(rank)
        groups[rank].configure(f"127.0.0.1:{store.port}/{prefix}", f"r{rank}", rank, 2)
        tensor = torch.ones(1, device="cuda")
        groups[rank].allreduce([tensor]).wait()
        return tensor.item()

    assert each(list(groups), lambda rank, _: act(rank, "first")) == [2.0, 2.0]
    groups[0].abort()
    assert groups[0].errored() is not None
    assert each(list(groups), lambda rank, _: act(rank, "second")) == [2.0, 2.0]
    for pg in groups:
        pg.shutdown()
