"""Collectives between Intel GPUs with torch's XCCL backend, in this process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torchft.process_group.backend import torch_group
from torchft.process_group.base import DEFAULT_TIMEOUT
from torchft.process_group.device_group import NEVER, DeviceProcessGroup, check_hardware
from torchft.process_group.session import Session

__all__ = ["ProcessGroupXCCL"]


class ProcessGroupXCCL(DeviceProcessGroup):
    """A reconfigurable group on XCCL. A work's ``wait()`` makes the current stream wait, not the host.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: this torch has no XCCL, or there is no XPU.
    """

    _module: ClassVar[Any] = torch.xpu

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        check_hardware("ProcessGroupXCCL", "XCCL", c10d.is_xccl_available(), "an XPU", torch.xpu.is_available())
        super().__init__(timeout)

    def getBackendName(self) -> str:
        return "torchft-xccl"

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        xccl: Any = c10d.ProcessGroupXCCL
        options = xccl.Options()
        options._timeout = NEVER
        backend = xccl(session.store, rank, world_size, options)
        group = torch_group(backend, dist.ProcessGroup.BackendType.XCCL, "xpu", rank, world_size)
        self._watch_device(session, backend.abort)
        if session.aborted.is_set():
            session.cut()
        return group
