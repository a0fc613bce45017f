"""The process group that torch sees in place of the replica dimension: its collectives are the Manager's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft.process_group.base import ProcessGroupError, reduce_op_of
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.work import CompletedWork

__all__ = ["ManagedProcessGroup", "ManagerLike"]


class ManagerLike(Protocol):
    """What of a Manager is used here."""

    def allreduce(self, tensor: torch.Tensor, should_quantize: bool = False, reduce_op: Any = ReduceOp.AVG) -> Work: ...
    def num_participants(self) -> int: ...
    def participating_rank(self) -> int | None: ...
    def errored(self) -> Any: ...
    def report_error(self, e: Exception) -> None: ...


class ManagedProcessGroup(ProcessGroupWrapper):
    """Allreduce through a Manager, so that errors are reported there and never raised.

    Its size is the number of participants of the step (1 where its quorum failed) and its rank the participating rank
    (0 while this group does not participate): torch knows no empty group and no missing rank. All reductions are
    possible; AVG divides by the number of participants. Work completes in any case: whether it did what it should is
    known when the step is committed.

    Broadcasting and waiting, which torch's wrappers do when they are built, are no-ops: each replica group starts
    from its own weights, and joiners are healed by the Manager. Other collectives are not supported.

    Args:
        manager: does the work. Its process group is configured by its quorums, so this one must not be.
    """

    _related = False  # torch's default group has the ranks of this replica group

    def __init__(self, manager: ManagerLike) -> None:
        super().__init__()
        self._manager = manager

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
        """Always an error.

        Raises:
            ProcessGroupError: the Manager configures its own group.
        """
        raise ProcessGroupError("a ManagedProcessGroup is configured by its Manager's quorums")

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        if op in ("allreduce", "allreduce_coalesced"):
            tensors, opts = args
            reduce_op = reduce_op_of(opts)
            works = [self._manager.allreduce(tensor, reduce_op=reduce_op) for tensor in tensors]
            return _AllOf(works, {t.device for t in tensors if t.device.type != "cpu"})
        if op in ("broadcast", "barrier"):
            return CompletedWork(result)
        raise self._unsupported(op)

    def abort(self) -> None:
        """Reports an error: the step is not committed and the next quorum makes a new group."""
        self._manager.report_error(ProcessGroupError("the managed process group was aborted"))

    def errored(self) -> Exception | None:
        """The error that was reported to the Manager in this step."""
        found = self._manager.errored()
        return found if found is None or isinstance(found, Exception) else getattr(found, "original_exception", None)

    def shutdown(self) -> None:
        """Nothing: the group belongs to the Manager."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Nothing: the Manager bounds its collectives."""

    def size(self) -> int:
        return max(1, self._manager.num_participants())

    def rank(self) -> int:
        return self._manager.participating_rank() or 0

    def getBackendName(self) -> str:
        return "torchft-managed"


class _AllOf(CompletedWork):
    """Several works as one.

    Args:
        works: one for each tensor.
        devices: accelerators that the tensors are on.
    """

    def __init__(self, works: list[Work], devices: set[torch.device]) -> None:
        super().__init__(None)
        self._works = works
        futures = [work.get_future() for work in works]
        # A future makes the streams of who waits for it wait only for devices that it was made with, and what
        # collect_all returns knows none. What follows `ended` runs on streams of its own of these devices.
        ended: Future[Any] = Future(devices=list(devices))
        self._future = ended.then(lambda _: [value for future in futures for value in _as_list(future.wait())])
        torch.futures.collect_all(futures).add_done_callback(lambda _: ended.set_result(None))

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout) if timeout else work.wait()
        return True


def _as_list(value: Any) -> list[torch.Tensor]:
    return value if isinstance(value, list) else [value]
