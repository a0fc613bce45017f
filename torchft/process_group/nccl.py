"""Collectives between GPUs with torch's NCCL backend, in this process.

Aborting tears the communicators down, which ends the kernels that wait in them; ``ProcessGroupBabyNCCL`` is the
choice where even that may hang.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from torchft.process_group.backend import BackendProcessGroup, torch_group
from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError
from torchft.process_group.session import Session

__all__ = ["ProcessGroupNCCL"]


class ProcessGroupNCCL(BackendProcessGroup):
    """A reconfigurable group on NCCL. A work's ``wait()`` makes the current stream wait, not the host.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: this torch has no NCCL, or there is no GPU.
    """

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        if not dist.is_nccl_available():
            raise ProcessGroupError("ProcessGroupNCCL needs a torch built with NCCL; this one has none")
        if not torch.cuda.is_available():
            raise ProcessGroupError("ProcessGroupNCCL needs a CUDA device; torch finds none")
        super().__init__(timeout)

    def getBackendName(self) -> str:
        return "torchft-nccl"

    def _enter_thread(self) -> Callable[[], None]:
        return partial(torch.cuda.set_device, torch.cuda.current_device())  # each thread has its own

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        assert session.store is not None
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking = 0  # so that an abort is not stuck behind a communicator that is being made
        options._timeout = timeout
        if global_ranks:
            options.global_ranks_in_group = global_ranks
        backend = dist.ProcessGroupNCCL(session.store, rank, world_size, options)
        group = torch_group(backend, dist.ProcessGroup.BackendType.NCCL, "cuda", rank, world_size)
        session.cut = backend.abort
        if session.aborted.is_set():
            backend.abort()
            raise ProcessGroupError(f"{session.name} was aborted before it met the others")
        backend._set_sequence_number_for_group()
        backend.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
        return group
