"""All collectives through one door.

``ProcessGroupWrapper`` turns each collective of the interface into one call of :meth:`_run`, with options made
whole. What a kind of group does differently (issue it to a backend, swallow its error, fake one, answer it
locally) it does there, once for all collectives. By default ``_run`` passes on to the wrapped group.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    ReduceOp,
    ReduceScatterOptions,
    Work,
)

from torchft.process_group.base import ProcessGroup, Reduction

__all__ = ["ProcessGroupWrapper"]


class ProcessGroupWrapper(ProcessGroup):
    """A group that passes everything on to another one.

    Args:
        pg: the wrapped group. None: the subclass answers everything itself.
    """

    def __init__(self, pg: ProcessGroup | None = None) -> None:
        super().__init__()
        self._pg = pg

    @property
    def parent(self) -> ProcessGroup:
        """The wrapped group."""
        if self._pg is None:
            raise self._unsupported("wrapped group")
        return self._pg

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        """Does one collective.

        Args:
            op: name of the method.
            args: its arguments, options included.
            result: the tensors that hold the outcome, in the shape that the work's future has as its value.
        """
        work: Work = getattr(self.parent, op)(*args)
        return work

    # ---------------------------------------------------------------------------------------------- life

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
        self.parent.configure(
            store_addr,
            replica_id,
            rank,
            world_size,
            quorum_id,
            group_rank,
            group_world_size,
            global_ranks,
        )

    def abort(self) -> None:
        self.parent.abort()

    def errored(self) -> Exception | None:
        return self.parent.errored()

    def shutdown(self) -> None:
        self.parent.shutdown()

    def set_timeout(self, timeout: timedelta) -> None:
        self.parent.set_timeout(timeout)

    def size(self) -> int:
        return self._world_size if self._pg is None else self._pg.size()

    def rank(self) -> int:
        return self._rank if self._pg is None else self._pg.rank()

    def getBackendName(self) -> str:
        return self.parent.getBackendName()

    # ---------------------------------------------------------------------------------------- collectives

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | Reduction | None = None) -> Work:
        return self._run("allreduce", (tensors, _options(AllreduceOptions, opts)), tensors)

    def allreduce_coalesced(
        self, tensors: list[torch.Tensor], opts: AllreduceCoalescedOptions | Reduction | None = None
    ) -> Work:
        return self._run("allreduce_coalesced", (tensors, _options(AllreduceCoalescedOptions, opts)), tensors)

    def allgather(
        self,
        output_tensors: list[list[torch.Tensor]],
        input_tensor: list[torch.Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        args = (output_tensors, input_tensor, _options(AllgatherOptions, opts))
        return self._run("allgather", args, output_tensors)

    def allgather_into_tensor_coalesced(
        self,
        output_tensors: list[torch.Tensor],
        input_tensors: list[torch.Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        args = (output_tensors, input_tensors, _options(AllgatherOptions, opts))
        return self._run("allgather_into_tensor_coalesced", args, output_tensors)

    def alltoall_base(
        self,
        output_buffer: torch.Tensor,
        input_buffer: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        options = _options(AllToAllOptions, opts)
        args = (output_buffer, input_buffer, output_split_sizes, input_split_sizes, options)
        return self._run("alltoall_base", args, [output_buffer])

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        return self._run("barrier", (_options(BarrierOptions, opts),), [])

    def broadcast(self, tensor_list: list[torch.Tensor], opts: BroadcastOptions | None = None) -> Work:
        return self._run("broadcast", (tensor_list, _options(BroadcastOptions, opts)), tensor_list)

    def reduce_scatter(
        self,
        output_tensors: list[torch.Tensor],
        input_tensors: list[list[torch.Tensor]],
        opts: ReduceScatterOptions | Reduction | None = None,
    ) -> Work:
        args = (output_tensors, input_tensors, _options(ReduceScatterOptions, opts))
        return self._run("reduce_scatter", args, output_tensors)

    def reduce_scatter_tensor_coalesced(
        self,
        output_tensors: list[torch.Tensor],
        input_tensors: list[torch.Tensor],
        opts: ReduceScatterOptions | Reduction | None = None,
    ) -> Work:
        args = (output_tensors, input_tensors, _options(ReduceScatterOptions, opts))
        return self._run("reduce_scatter_tensor_coalesced", args, output_tensors)

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        return self._run("send", (tensors, dst_rank, tag), tensors)

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        return self._run("recv", (tensors, src_rank, tag), tensors)


def _options(kind: type[Any], given: Any) -> Any:
    """``given`` as options of that kind: itself, or fresh ones with ``given`` as their reduction."""
    if type(given) is kind:
        return given
    if given is None:
        return kind()
    if isinstance(given, (ReduceOp, ReduceOp.RedOpType)):
        options = kind()
        options.reduceOp = given
        return options
    return given  # options of a related kind, which torch's functions pass now and then
