"""Messages to members of a process group, or from one: a few on their way at a time, in order, before one deadline.

Rules
    - A member that fails is left out from then on; a source goes on for the others.
    - Every wait is bounded by the deadline, and none begins once the transfer is aborted.
    - Messages that are not a tensor's own memory lie in buffers, which are lent and kept for the next time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import Work

from torchft.checkpointing.pg_stream import BUCKET, DEVICE_BUCKET
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import CheckpointError, CheckpointTimeout, SourceLost
from torchft.runtime.deadline import Deadline

__all__ = ["AHEAD", "Link", "SendRecv", "message_of"]

_TAG = 1
_READY = 2
AHEAD = 3
"""Messages that are on their way while the next is hashed, and buffers that are waited for."""


class SendRecv(Protocol):
    """What is used of a process group."""

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work: ...


class Link:
    """See the module.

    Args:
        pg: whose members they are.
        device: what it communicates.
        ranks: receivers, or the one source.
        deadline: until when.
        buffers: to take from and to give back to.
        transfer: that the messages belong to.
    """

    def __init__(
        self,
        pg: SendRecv,
        device: torch.device,
        ranks: Sequence[int],
        deadline: Deadline,
        buffers: list[torch.Tensor],
        transfer: Transfer,
    ) -> None:
        self._pg = pg
        self._device = device
        self._ranks = list(ranks)
        self._deadline = deadline
        self._free = buffers
        self._transfer = transfer
        self._lent: set[int] = set()
        self._under_way: deque[tuple[torch.Tensor, list[tuple[int, Work]]]] = deque()
        self._failed: dict[int, Exception] = {}

    def buffer(self, length: int) -> torch.Tensor:
        """Memory for one message; given back by :meth:`done_with`."""
        while self._free and self._free[-1].numel() < length:
            self._free.pop()  # of a source with smaller messages
        if self._free:
            whole = self._free.pop()
        else:
            size = max(length, BUCKET if self._device.type == "cpu" else DEVICE_BUCKET)
            whole = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._lent.add(whole.data_ptr())
        return whole[:length]

    @property
    def lent(self) -> int:
        """Buffers that are not given back."""
        return len(self._lent)

    @property
    def lost(self) -> bool:
        """Whether nobody is left to send to."""
        return len(self._failed) == len(self._ranks)

    def done_with(self, message: torch.Tensor) -> None:
        if message.data_ptr() in self._lent:
            self._lent.remove(message.data_ptr())
            assert message._base is not None
            self._free.append(message._base)

    def send(self, message: torch.Tensor) -> None:
        message = message if message.device.type == self._device.type else message.to(self._device)
        works: list[tuple[int, Work]] = []
        for rank in self._ranks:
            if rank not in self._failed:
                try:
                    works.append((rank, self._pg.send([message], rank, _TAG)))
                except Exception as e:
                    self._failed[rank] = e
        self._under_way.append((message, works))
        while len(self._under_way) > AHEAD:
            self._sent()

    def _sent(self) -> None:
        message, works = self._under_way.popleft()
        for rank, work in works:
            if rank not in self._failed:
                try:
                    self._wait(work, rank)
                except Exception as e:
                    self._failed[rank] = e
        self.done_with(message)
        if self.lost:
            self._under_way.clear()

    def drain(self) -> None:
        """Returns when everything sent so far is out, or has failed."""
        while self._under_way:
            self._sent()

    def await_ready(self) -> None:
        """Returns when each receiver has announced messages, or has failed."""
        works: list[tuple[int, Work]] = []
        for rank in self._ranks:
            if rank not in self._failed:
                try:
                    works.append((rank, self._pg.recv([message_of(b"\0")], rank, _READY)))
                except Exception as e:
                    self._failed[rank] = e
        for rank, work in works:
            try:
                self._wait(work, rank)
            except Exception as e:
                self._failed[rank] = e

    def tell_ready(self) -> None:
        """What :meth:`await_ready` waits for."""
        rank = self._ranks[0]
        try:
            self._wait(self._pg.send([message_of(b"\1").to(self._device)], rank, _READY), rank)
        except CheckpointError:
            raise
        except Exception as e:
            raise self._lost(e) from e

    def raise_failures(self, step: int) -> None:
        if self._failed:
            text = "; ".join(f"replica rank {r}: {e}" for r, e in self._failed.items())
            late = all(isinstance(e, TimeoutError) for e in self._failed.values())
            kind = CheckpointTimeout if late else CheckpointError
            raise kind(f"step {step} could not be sent to {text}") from next(iter(self._failed.values()))

    def recv(self, message: torch.Tensor) -> None:
        rank = self._ranks[0]
        try:
            self._under_way.append((message, [(rank, self._pg.recv([message], rank, _TAG))]))
        except Exception as e:
            raise self._lost(e) from e

    def wait_first(self) -> None:
        """Waits for the oldest receive."""
        _, [(rank, work)] = self._under_way.popleft()
        try:
            self._wait(work, rank)
        except CheckpointError:
            raise
        except Exception as e:
            raise self._lost(e) from e

    def recv_bytes(self, length: int) -> bytes:
        message = torch.zeros(length, dtype=torch.uint8, device=self._device)
        self.recv(message)
        self.wait_first()
        return message.cpu().numpy().tobytes()

    def _wait(self, work: Work, rank: int) -> None:
        self._transfer.check()
        left = self._deadline.remaining()
        try:
            if left > 0:
                work.wait(timedelta(seconds=max(0.001, left)))
                return
        except Exception as e:
            if not self._deadline.expired:
                raise
            raise self._late(rank) from e
        if not work.is_completed():
            raise self._late(rank)

    def _late(self, rank: int) -> CheckpointTimeout:
        return CheckpointTimeout(
            f"replica rank {rank} did not take part within {self._deadline.timeout:g}s: it is slow, hangs, or died; a "
            "longer timeout allows for a larger state"
        )

    def _lost(self, cause: Exception) -> SourceLost:
        return SourceLost(f"replica rank {self._ranks[0]}, the source, was lost: {cause}")


def message_of(data: bytes) -> torch.Tensor:
    """A message of these bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
