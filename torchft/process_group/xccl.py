"""Collectives between Intel GPUs with torch's XCCL backend, in this process."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torchft.process_group.backend import BackendProcessGroup, torch_group
from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError
from torchft.process_group.session import Session

__all__ = ["ProcessGroupXCCL"]


class ProcessGroupXCCL(BackendProcessGroup):
    """A reconfigurable group on XCCL. A work's ``wait()`` makes the current stream wait, not the host.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: this torch has no XCCL, or there is no XPU.
    """

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        if not c10d.is_xccl_available():
            raise ProcessGroupError("ProcessGroupXCCL needs a torch built with XCCL; this one has none")
        if not torch.xpu.is_available():
            raise ProcessGroupError("ProcessGroupXCCL needs an XPU device; torch finds none")
        super().__init__(timeout)

    def getBackendName(self) -> str:
        return "torchft-xccl"

    def _enter_thread(self) -> Callable[[], None]:
        return partial(torch.xpu.set_device, torch.xpu.current_device())  # each thread has its own

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        xccl: Any = c10d.ProcessGroupXCCL
        options = xccl.Options()
        options._timeout = timeout
        backend = xccl(session.store, rank, world_size, options)
        group = torch_group(backend, dist.ProcessGroup.BackendType.XCCL, "xpu", rank, world_size)
        session.cut = backend.abort
        if session.aborted.is_set():
            backend.abort()
        return group
