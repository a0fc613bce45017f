"""Collectives between GPUs with torch's NCCL backend, in this process.

A collective that fails, or takes too long on the device, ends its session (``device_group``); the training thread never
waits for the device. Aborting tears the communicators down, which ends the kernels that wait in them;
``ProcessGroupBabyNCCL`` is the choice where even that may hang.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from torchft.process_group.backend import torch_group
from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError
from torchft.process_group.device_group import NEVER, DeviceProcessGroup, check_hardware
from torchft.process_group.session import Session

__all__ = ["ProcessGroupNCCL"]


class ProcessGroupNCCL(DeviceProcessGroup):
    """A reconfigurable group on NCCL. A work's ``wait()`` makes the current stream wait, not the host.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: this torch has no NCCL, or there is no GPU.
    """

    _module: ClassVar[Any] = torch.cuda

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        check_hardware("ProcessGroupNCCL", "NCCL", dist.is_nccl_available(), "a CUDA", torch.cuda.is_available())
        super().__init__(timeout)

    def getBackendName(self) -> str:
        return "torchft-nccl"

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        assert session.store is not None
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking = 0  # so that an abort is not stuck behind a communicator that is being made
        options._timeout = NEVER
        if global_ranks:
            options.global_ranks_in_group = global_ranks
        with _errors_are_ours():
            backend = dist.ProcessGroupNCCL(session.store, rank, world_size, options)
        group = torch_group(backend, dist.ProcessGroup.BackendType.NCCL, "cuda", rank, world_size)
        self._watch_device(session, backend.abort)
        if session.aborted.is_set():
            session.cut()
            raise ProcessGroupError(f"{session.name} was aborted before it met the others")
        backend._set_sequence_number_for_group()
        backend.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
        return group


_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_environment = threading.Lock()


@contextmanager
def _errors_are_ours() -> Iterator[None]:
    """What is constructed inside leaves errors to whoever asks. torch's watchdog would else end the process when
    another member dies. It reads its orders from the environment, in the constructor and nowhere else."""
    with _environment:
        former = os.environ.get(_ERROR_HANDLING)
        os.environ[_ERROR_HANDLING] = "0"
        try:
            yield
        finally:
            if former is None:
                del os.environ[_ERROR_HANDLING]
            else:
                os.environ[_ERROR_HANDLING] = former
