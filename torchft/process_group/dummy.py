"""Collectives of a group of one: copies inside the process, done when they return."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work

from torchft.process_group.base import ProcessGroupError
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.work import CompletedWork

__all__ = ["COLLECTIVES", "ProcessGroupDummy", "run_alone"]


def _same(*_: Any) -> None:
    """Reducing, broadcasting and waiting alone leave everything as it is."""


def _copy_each(outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any) -> None:
    for output, value in zip(outputs, inputs, strict=True):
        output.view(-1).copy_(value.reshape(-1))


def _gather(outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], *_: Any) -> None:
    for slots, value in zip(outputs, inputs, strict=True):
        slots[0].copy_(value)


def _scatter(outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], *_: Any) -> None:
    for output, slots in zip(outputs, inputs, strict=True):
        output.copy_(slots[0])


def _alltoall(output: torch.Tensor, value: torch.Tensor, *_: Any) -> None:
    output.copy_(value)


def _nobody(*_: Any) -> None:
    raise ProcessGroupError("a group of one has nobody to send to or to receive from")


_ALONE = {
    "allreduce": _same,
    "allreduce_coalesced": _same,
    "broadcast": _same,
    "barrier": _same,
    "allgather": _gather,
    "allgather_into_tensor_coalesced": _copy_each,
    "alltoall_base": _alltoall,
    "reduce_scatter": _scatter,
    "reduce_scatter_tensor_coalesced": _copy_each,
    "send": _nobody,
    "recv": _nobody,
}

COLLECTIVES = tuple(_ALONE)


def run_alone(op: str, args: tuple[Any, ...], result: Any) -> Work:
    """Does the collective ``op`` of a group of one.

    Raises:
        ProcessGroupError: it is ``send`` or ``recv``.
    """
    with torch.no_grad():
        _ALONE[op](*args)
    return CompletedWork(result)


class ProcessGroupDummy(ProcessGroupWrapper):
    """A group of one, whatever it is told: to build torch's DDP on, and for tests.

    Args:
        rank: must be 0.
        world: must be 1.

    Raises:
        ValueError: rank or world is something else.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        if (rank, world) != (0, 1):
            raise ValueError(f"a ProcessGroupDummy has rank 0 of 1, not rank {rank} of {world}")
        super().__init__()
        self.configure_count = 0

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        """Counts the call in ``configure_count``."""
        self.configure_count += 1

    def abort(self) -> None:
        """Nothing is ever pending."""

    def errored(self) -> Exception | None:
        return None

    def shutdown(self) -> None:
        """Nothing is held."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Nothing ever waits."""

    def getBackendName(self) -> str:
        return "torchft-dummy"

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        return run_alone(op, args, result)
