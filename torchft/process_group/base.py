"""The process group that can be reconfigured: what every kind in this package is, seen from outside.

The idea
    A ``torch.distributed.ProcessGroup`` has its members for life. Between replica groups the members change at
    every quorum, so ours is an object that lives as long as its Manager and is *configured*, again and again, to
    meet the members of the newest quorum under an address of a store.

Rules
    1. ``configure`` aborts whatever the group was doing, then meets the new members; it may be called any number
       of times, from any thread. Before the first one the group is unconfigured.
    2. Every wait, in ``configure`` and in a collective, is bounded by the group's timeout.
    3. A failed collective makes the group *errored*: ``errored()`` tells the cause, later collectives fail at once.
       Only ``configure`` ends that.
    4. ``abort`` makes pending and later collectives fail quickly, and so lets go of members that wait for this one.
    5. A collective returns a ``torch.distributed.Work`` or raises; it never blocks for other members itself.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
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

from torchft.process_group import registry

__all__ = ["DEFAULT_TIMEOUT", "ProcessGroup", "ProcessGroupError", "Reduction", "reduce_op_of"]

DEFAULT_TIMEOUT = timedelta(seconds=60)

Reduction = ReduceOp | ReduceOp.RedOpType
"""``ReduceOp.SUM`` and such, made into an object or not."""

# torch's stubs declare each collective with several overloads. Ours take one form each, which its C++ code and
# torch.distributed's functions use; to the type checker the base is therefore anything.
_TorchProcessGroup: Any = Any if TYPE_CHECKING else dist.ProcessGroup


class ProcessGroupError(RuntimeError):
    """A process group cannot do what it was asked: not configured, aborted, errored, or its store is gone."""


class ProcessGroup(_TorchProcessGroup):  # type: ignore[misc]
    """The interface of the module's docstring. Arguments of collectives are those of ``torch.distributed``'s
    process groups; ``opts`` may always be left out, and a plain ``ReduceOp`` is taken where one is meant.

    Rank and size are those of the last ``configure``: 0 and 1 before the first.
    """

    _related = True
    """Registered, its members are those of torch's default group, by their numbers there."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self._rank = 0
        self._world_size = 1
        self._registered_name: str | None = None

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
        """Leaves the former members and meets the new ones.

        Args:
            store_addr: ``host:port/prefix`` of a TCPStore that all members reach; the prefix, which may contain
                slashes, must be the same for all members of this configuration and for no other one.
            replica_id: of the caller's replica group, for messages.
            rank: of the caller, 0 up to ``world_size - 1``.
            world_size: number of members.
            quorum_id: the quorum that this configuration belongs to, for messages.
            group_rank: the caller's rank inside its replica group, for messages.
            group_world_size: ranks in the replica group, for messages.
            global_ranks: global ranks of the members; used by backends that trace by them.

        Raises:
            ProcessGroupError: the store or a member was not there within the timeout, or ``abort`` was called
                meanwhile. The group is then unconfigured.
            ValueError: rank, world size or store address make no sense.
        """
        raise self._unsupported("configure")

    def abort(self) -> None:
        """Ends pending collectives with an error and makes later ones fail, until the next ``configure``.

        Returns at once, may be called from any thread and more than once. It also ends a ``configure``, whatever
        that waits for.
        """
        raise self._unsupported("abort")

    def errored(self) -> Exception | None:
        """Why the group can no longer be used, or None. Does not wait for pending collectives."""
        raise self._unsupported("errored")

    def shutdown(self) -> None:
        """Aborts and releases sockets, threads and memory. A later ``configure`` makes the group usable again."""
        raise self._unsupported("shutdown")

    def set_timeout(self, timeout: timedelta) -> None:
        """Changes the longest wait of later collectives and configurations. Pending ones keep theirs."""
        raise self._unsupported("set_timeout")

    # ---------------------------------------------------------------------------------------- collectives

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | Reduction | None = None) -> Work:
        """Reduces each tensor over all members, in place."""
        raise self._unsupported("allreduce")

    def allreduce_coalesced(
        self, tensors: list[torch.Tensor], opts: AllreduceCoalescedOptions | Reduction | None = None
    ) -> Work:
        """Reduces several tensors of one type as one collective, in place."""
        raise self._unsupported("allreduce_coalesced")

    def allgather(
        self,
        output_tensors: list[list[torch.Tensor]],
        input_tensor: list[torch.Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        """``output_tensors[i][r]`` becomes member r's ``input_tensor[i]``."""
        raise self._unsupported("allgather")

    def allgather_into_tensor_coalesced(
        self,
        output_tensors: list[torch.Tensor],
        input_tensors: list[torch.Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        """Each output becomes all members' inputs of the same index, one after another along dimension 0."""
        raise self._unsupported("allgather_into_tensor_coalesced")

    def alltoall_base(
        self,
        output_buffer: torch.Tensor,
        input_buffer: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        """Sends part r of the input to member r and receives part r of the output from it. Sizes are rows of
        dimension 0; empty lists mean equal parts."""
        raise self._unsupported("alltoall_base")

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        """Done when every member has called it."""
        raise self._unsupported("barrier")

    def broadcast(self, tensor_list: list[torch.Tensor], opts: BroadcastOptions | None = None) -> Work:
        """Copies the root's tensor (``opts.rootRank``, default 0) to all members."""
        raise self._unsupported("broadcast")

    def broadcast_one(self, tensor: torch.Tensor, root: int) -> Work:
        """:meth:`broadcast` of one tensor from rank ``root``."""
        opts = BroadcastOptions()
        opts.rootRank = root
        return self.broadcast([tensor], opts)

    def reduce_scatter(
        self,
        output_tensors: list[torch.Tensor],
        input_tensors: list[list[torch.Tensor]],
        opts: ReduceScatterOptions | Reduction | None = None,
    ) -> Work:
        """``output_tensors[i]`` becomes the reduction over all members of ``input_tensors[i][rank]``."""
        raise self._unsupported("reduce_scatter")

    def reduce_scatter_tensor_coalesced(
        self,
        output_tensors: list[torch.Tensor],
        input_tensors: list[torch.Tensor],
        opts: ReduceScatterOptions | Reduction | None = None,
    ) -> Work:
        """Each output becomes the reduction over all members of the rank-th part (dimension 0) of its input."""
        raise self._unsupported("reduce_scatter_tensor_coalesced")

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        """Sends a tensor to one member."""
        raise self._unsupported("send")

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        """Receives a tensor from one member, in place."""
        raise self._unsupported("recv")

    # Single-tensor spellings under which torch.distributed's own functions ask for the same.

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: AllgatherOptions | None = None) -> Work:
        return self.allgather_into_tensor_coalesced([output], [input], opts)

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: AllgatherOptions | None = None
    ) -> Work:
        return self.allgather_into_tensor_coalesced([output], [input], opts)

    def _reduce_scatter_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        opts: ReduceScatterOptions | Reduction | None = None,
    ) -> Work:
        return self.reduce_scatter_tensor_coalesced([output], [input], opts)

    def reduce_scatter_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        opts: ReduceScatterOptions | Reduction | None = None,
    ) -> Work:
        return self.reduce_scatter_tensor_coalesced([output], [input], opts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        return self.alltoall_base(output, input, output_split_sizes, input_split_sizes, opts)

    # -------------------------------------------------------------------------------------------- queries

    def size(self) -> int:
        """Number of members."""
        return self._world_size

    def rank(self) -> int:
        """Rank of the caller among the members."""
        return self._rank

    def getBackendName(self) -> str:
        """``torchft-`` and the name of what carries the collectives."""
        raise self._unsupported("getBackendName")

    # The names under which torch's C++ code asks a Python process group.

    def getSize(self) -> int:
        return self.size()

    def getRank(self) -> int:
        return self.rank()

    def getGroupName(self) -> str:
        return self._registered_name or f"torchft-unregistered-{id(self):x}"

    # --------------------------------------------------------------------------------------- registration

    def register(self, name: str) -> dist.ProcessGroup:
        """Makes the group known to torch under ``name``, for functional collectives and ``dist.*(group=...)``.

        The members may go on changing afterwards; what was compiled for one size does not fit another.

        Returns:
            The group itself, as torch sees it; its name there is ``group_name``.

        Raises:
            ProcessGroupError: it is registered already.
            ValueError: torch knows another group of that name.
        """
        if self._registered_name is not None:
            raise ProcessGroupError(f"the process group is registered already, as {self._registered_name!r}")
        registry.register(self, name, self._related)
        self._registered_name = name
        return self

    def unregister(self) -> None:
        """Undoes :meth:`register`. Without one it does nothing."""
        if self._registered_name is not None:
            registry.unregister(self, self._registered_name)
            self._registered_name = None

    def _unsupported(self, what: str) -> Exception:
        return NotImplementedError(f"{type(self).__name__} has no {what}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank()}, size={self.size()})"


def reduce_op_of(opts: Any) -> Any:
    """The ``ReduceOp`` of options or of itself; SUM when there is none."""
    return getattr(opts, "reduceOp", opts) if opts is not None else ReduceOp.SUM
