"""The classes: a group as :mod:`torchft.process_group.backend` has them, whose sessions are carried by a child.

Rules
    1. A child serves one configuration after the other as long as it is healthy and nothing is pending on it. It is
       killed by an abort, by a configuration that fails, and by one that comes while something is pending.
    2. A child that dies makes the session errored, whether or not something was pending.
    3. The process that children are forked from is one for all groups of this process. It starts with the first group
       and ends when the last one was shut down, or with this process.
"""

from __future__ import annotations

import os
import threading
import weakref
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import Work
from torch.distributed import distributed_c10d as c10d

from torchft.process_group.baby.carrier import GRACE, Carrier
from torchft.process_group.baby.gpu import GpuBlock
from torchft.process_group.baby.memory import Block, HostBlock
from torchft.process_group.backend import BackendProcessGroup, Membership
from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError
from torchft.process_group.device_group import check_hardware
from torchft.process_group.session import STORE_GRACE, Session, nothing
from torchft.runtime.deadline import Deadline
from torchft.runtime.nursery import Nursery, NurseryError

__all__ = ["ProcessGroupBabyGloo", "ProcessGroupBabyNCCL", "ProcessGroupBabyXCCL", "use_nursery"]

_lock = threading.Lock()
_nursery: Nursery | None = None
_users: weakref.WeakSet[_BabyProcessGroup] = weakref.WeakSet()


def use_nursery(nursery: Nursery) -> None:
    """Children of this process come from there; to be called before the first group is made."""
    global _nursery
    _nursery = nursery


class _BabyProcessGroup(BackendProcessGroup):
    _host: ClassVar[str]
    """``module:Class`` of the group in the child."""
    _library: ClassVar[str]
    """That carries its collectives; in the backend's name."""
    _device_type: ClassVar[str] = "cpu"
    """On what the child's group works."""

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        global _nursery
        super().__init__(timeout)
        self._carrier: Carrier | None = None  # of the session in place
        self._kept: Carrier | None = None  # of the one before it, while the next is made
        with _lock:
            if _nursery is None:
                _nursery = Nursery(["torchft.process_group.baby.child", "torchft.process_group"], "baby nursery")
            self._children = _nursery
            _users.add(self)
        try:
            self._children.start()
        except NurseryError as e:
            raise ProcessGroupError(f"{type(self).__name__}: {e}") from e

    def _device(self) -> torch.device:
        """On which the child's group works."""
        if self._device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self._device_type, torch.get_device_module(self._device_type).current_device())

    def getBackendName(self) -> str:
        return f"torchft-baby-{self._library}"

    @staticmethod
    def _make_block(device: torch.device, number: int, size: int) -> Block:
        return HostBlock(number, size)

    @property
    def child_pid(self) -> int | None:
        """The process that carries the collectives now; None: there is none."""
        carrier = self._carrier
        return carrier.pid if carrier is not None else None

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
        _users.add(self)
        with self._state:
            session, carrier = self._session, self._carrier
            if session is not None and carrier is not None and session.error is None and carrier.idle:
                session.cut = nothing  # its end is not that of its child
                self._kept, self._carrier = carrier, None
        super().configure(
            store_addr, replica_id, rank, world_size, quorum_id, group_rank, group_world_size, global_ranks
        )

    def _build(self, session: Session, member: Membership, deadline: Deadline) -> None:
        with self._state:
            carrier, self._kept = self._kept, None
        if carrier is None or not carrier.idle:
            carrier = self._start(session, deadline)
        session.cut = partial(carrier.kill, f"aborted: {session.name}")
        carrier.on_failure(session.fail)
        if session.aborted.is_set():
            session.cut()
            raise self._unfinished(session, deadline)
        arguments: dict[str, Any] = {
            "store_addr": member.store_addr,
            "replica_id": member.replica_id,
            "rank": member.rank,
            "world_size": member.world_size,
            "quorum_id": member.quorum_id,
            "global_ranks": member.global_ranks,
        }
        remaining = timedelta(seconds=max(0.001, deadline.remaining()))
        answer = carrier.configure(arguments, remaining, session.woken.set)
        session.woken.wait(deadline.remaining() + 2 * STORE_GRACE + GRACE)
        if session.aborted.is_set():
            raise self._unfinished(session, deadline)
        told = answer()
        if told is None:
            raise self._unfinished(session, deadline) if carrier.idle else carrier.end()
        if told["error"] is not None:
            raise ProcessGroupError(told["error"])
        carrier.set_timeout(self._timeout)
        session.issue = dict(carrier.issue)
        with self._state:
            self._carrier = carrier

    def _start(self, session: Session, deadline: Deadline) -> Carrier:
        device = self._device()
        try:
            return Carrier(
                self._children,
                self._host,
                str(device),
                partial(type(self)._make_block, device),
                deadline,
                lambda: not session.aborted.is_set(),
            )
        except NurseryError as e:
            if session.aborted.is_set():
                raise self._unfinished(session, deadline) from e
            raise ProcessGroupError(f"{session.name}: {e}") from e

    def shutdown(self) -> None:
        super().shutdown()
        with self._state:
            kept, self._kept, self._carrier = self._kept, None, None
        if kept is not None:
            kept.kill("the process group was shut down")
        with _lock:
            _users.discard(self)
            if not _users:
                self._children.close()

    def set_timeout(self, timeout: timedelta) -> None:
        super().set_timeout(timeout)
        carrier = self._carrier
        if carrier is not None and carrier.idle:
            carrier.set_timeout(self._timeout)

    def _watched(self, session: Session, op: str, args: tuple[Any, ...], work: Work, reached: Any) -> Work:
        return work  # the carrier tells the session

    def __del__(self) -> None:
        kept = getattr(self, "_kept", None)
        if kept is not None:
            kept.kill("the process group was dropped")


class ProcessGroupBabyGloo(_BabyProcessGroup):
    """Gloo in a child process. Its members may be plain gloo groups, too.

    A collective costs two copies of its tensors more than :class:`ProcessGroupGloo`'s, and leaves them as they were
    when it fails.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: the system is not Linux.
    """

    _host = "torchft.process_group.gloo:ProcessGroupGloo"
    _library = "gloo"


class ProcessGroupBabyNCCL(_BabyProcessGroup):
    """NCCL in a child process: for where aborting NCCL in the trainer may hang or take it down.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: this torch has no NCCL, there is no GPU, or the system is not Linux.
    """

    _host = "torchft.process_group.nccl:ProcessGroupNCCL"
    _library = "nccl"
    _device_type = "cuda"

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        check_hardware("ProcessGroupBabyNCCL", "NCCL", dist.is_nccl_available(), "a CUDA", torch.cuda.is_available())
        super().__init__(timeout)

    @staticmethod
    def _make_block(device: torch.device, number: int, size: int) -> Block:
        return GpuBlock(device, number, size)


class ProcessGroupBabyXCCL(_BabyProcessGroup):
    """XCCL in a child process. Tensors go through the computer's memory: torch has no way to share an XPU's.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.

    Raises:
        ProcessGroupError: this torch has no XCCL, there is no XPU, or the system is not Linux.
    """

    _host = "torchft.process_group.xccl:ProcessGroupXCCL"
    _library = "xccl"
    _device_type = "xpu"

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        check_hardware("ProcessGroupBabyXCCL", "XCCL", c10d.is_xccl_available(), "an XPU", torch.xpu.is_available())
        super().__init__(timeout)


def _after_fork_in_child() -> None:
    global _lock, _nursery
    _lock = threading.Lock()
    _nursery = None
    _users.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
