"""Messages to one member of a process group, or from it: many on their way at a time, in order, before one deadline.

The idea
    Waiting for a message costs a change of threads, so small messages are waited for in *groups*: for the last of those
    that make :data:`GROUP` bytes. Messages between two members under one tag complete in the order they were issued in.

Rules
    - Every wait is bounded by the deadline, and none begins once the transfer is aborted.
    - A message and its work are kept until their group has been waited for: a backend drops what nobody holds.
    - Messages that are not a tensor's own memory lie in buffers, which are lent and kept for the next time.
    - A link belongs to one thread, or to the lane that stands in for it (:meth:`Link.apart`). Links of several threads
      may share their buffers and the process group.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import Work

from torchft.checkpointing.pg_lane import Ending, Lane, Lost, ending_of
from torchft.checkpointing.pg_stream import BUCKET, DEVICE_BUCKET
from torchft.checkpointing.transfers import Transfer
from torchft.checkpointing.transport import CheckpointError, CheckpointTimeout, SourceLost
from torchft.runtime.deadline import Deadline

__all__ = ["GROUP", "Buffers", "Link", "SendRecv", "message_of"]

_TAG = 1
_ANSWER = 2
GROUP = 4 << 20
"""Bytes after which is waited. Larger: fewer changes of threads. Smaller: what has come is in the cache still, and the
thread that hashes it is done before gloo's wakes up and must look for another processor."""
_AHEAD = 4
"""Groups that are on their way while the next is issued."""


class SendRecv(Protocol):
    """What is used of a process group."""

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work: ...


class Buffers:
    """Memory for messages, kept and used again. From any thread.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, length: int) -> torch.Tensor:
        """At least that many bytes."""
        with self._lock:
            while self._free and self._free[-1].numel() < length:
                self._free.pop()  # of a source with smaller messages
            if self._free:
                return self._free.pop()
        size = max(length, BUCKET if self._device.type == "cpu" else DEVICE_BUCKET)
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def give(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._free.append(buffer)

    def clear(self) -> None:
        with self._lock:
            self._free.clear()


class Link:
    """See the module.

    Args:
        pg: whose member it is.
        device: what it communicates.
        rank: the receiver, or the source.
        deadline: until when.
        buffers: to take from and to give back to.
        transfer: that the messages belong to.
    """

    def __init__(
        self,
        pg: SendRecv,
        device: torch.device,
        rank: int,
        deadline: Deadline,
        buffers: Buffers,
        transfer: Transfer,
    ) -> None:
        self._pg = pg
        self._device = device
        self._rank = rank
        self._deadline = deadline
        self._buffers = buffers
        self.transfer = transfer
        self._lent: dict[int, torch.Tensor] = {}
        self._under_way: deque[tuple[torch.Tensor, Work]] = deque()
        self._groups: deque[int] = deque()
        """How many messages each group that is on its way has."""
        self._open_messages = self._open_bytes = 0
        self._ending: Ending | None = None
        self._lane: Lane | None = None

    def apart(self, job: Callable[[], None]) -> None:
        """Runs ``job``, which waits for many messages of this link, where waiting costs least. After the first message.

        Raises:
            Lost: the process group gave its works up. The cause says why.
            Exception: what the job raised.
        """
        if self._ending is None:
            job()
            return
        self._lane = Lane(self._ending)
        try:
            self._lane.run(job, f"torchft-transfer-{self._rank}")
        finally:
            self._lane = None

    @contextmanager
    def ends_transfer(self) -> Iterator[None]:
        """Inside, the transfer is aborted when the process group gives its works up. After the first message."""
        ending = self._ending
        if ending is None:
            yield
            return

        def give_up(error: Exception) -> None:
            self.transfer.abort(f"the process group was given up: {error}")

        ending.listen(give_up)
        try:
            yield
        finally:
            ending.leave(give_up)

    def buffer(self, length: int) -> torch.Tensor:
        """Memory for one message; given back by :meth:`done_with`, or when the message is sent."""
        whole = self._buffers.take(length)
        self._lent[whole.data_ptr()] = whole
        return whole[:length]

    def may_lend(self, largest: int) -> bool:
        """Whether another buffer may be waited for.

        Args:
            largest: bytes of the largest message.
        """
        return len(self._lent) < max(3, (_AHEAD + 1) * GROUP // largest)

    def done_with(self, message: torch.Tensor) -> None:
        """Gives the message's buffer back, if it has one."""
        whole = self._lent.pop(message.data_ptr(), None)
        if whole is not None:
            self._buffers.give(whole)

    # ---------------------------------------------------------------------------------------------- the source

    def send(self, message: torch.Tensor) -> None:
        """Returns when few enough messages are on their way."""
        message = message if message.device.type == self._device.type else message.to(self._device)
        work = self._pg.send([message], self._rank, _TAG)
        self._ending = ending_of(work)
        self._under_way.append((message, work))
        self._open_messages += 1
        self._open_bytes += message.numel()
        if self._open_bytes >= GROUP:
            self._close_group()
            while len(self._groups) > _AHEAD:
                self._await_group()

    def drain(self) -> None:
        """Returns when everything sent so far is out."""
        self._close_group()
        while self._groups:
            self._await_group()

    def _close_group(self) -> None:
        if self._open_messages:
            self._groups.append(self._open_messages)
            self._open_messages = self._open_bytes = 0

    def _await_group(self) -> None:
        count = self._groups.popleft()
        self._wait(self._under_way[count - 1][1])
        for _ in range(count):
            self.done_with(self._under_way.popleft()[0])

    def await_answer(self, *expected: int) -> int:
        """What the receiver answers.

        Raises:
            CheckpointError: something else than expected.
        """
        message = message_of(b"\0").to(self._device)
        self._wait(self._pg.recv([message], self._rank, _ANSWER))
        answer = int(message[0])
        if answer not in expected:
            raise CheckpointError(
                f"replica rank {self._rank} answered {answer} where one of {expected} was expected: run the same "
                "torchft on both sides"
            )
        return answer

    # -------------------------------------------------------------------------------------------- the receiver

    def answer(self, value: int) -> None:
        """What :meth:`await_answer` waits for."""
        try:
            self._wait(self._pg.send([message_of(bytes([value])).to(self._device)], self._rank, _ANSWER))
        except CheckpointError:
            raise
        except Exception as e:
            raise self._lost(e) from e

    def receive_apart(self, job: Callable[[], None]) -> None:
        """:meth:`apart`, for a receiver.

        Raises:
            SourceLost: the process group gave its works up.
            Exception: what the job raised.
        """
        try:
            self.apart(job)
        except Lost as e:
            raise self._lost(e) from e

    def recv(self, message: torch.Tensor) -> None:
        """Announces a message."""
        try:
            work = self._pg.recv([message], self._rank, _TAG)
        except Exception as e:
            raise self._lost(e) from e
        self._ending = ending_of(work)
        self._under_way.append((message, work))

    def await_first(self, count: int = 1) -> None:
        """Returns when the oldest ``count`` messages have come."""
        try:
            self._wait(self._under_way[count - 1][1])
        except (CheckpointError, Lost):
            raise
        except Exception as e:
            raise self._lost(e) from e
        for _ in range(count):
            self._under_way.popleft()

    def recv_bytes(self, length: int) -> bytes:
        message = torch.zeros(length, dtype=torch.uint8, device=self._device)
        self.recv(message)
        self.await_first()
        return message.cpu().numpy().tobytes()

    def _wait(self, work: Work) -> None:
        self.transfer.check()
        left = self._deadline.remaining()
        try:
            if left > 0:
                limit = timedelta(milliseconds=math.ceil(left * 1000) + 1)  # gloo's are whole: no earlier than ours
                if self._lane is None:
                    work.wait(limit)
                else:
                    self._lane.wait(work, limit)
                return
        except Lost:
            raise
        except Exception as e:
            if not self._deadline.expired:
                raise
            raise self._late() from e
        if not work.is_completed():
            raise self._late()

    def _late(self) -> CheckpointTimeout:
        return CheckpointTimeout(
            f"replica rank {self._rank} did not take part within {self._deadline.timeout:g}s: it is slow, hangs, or "
            "died; a longer timeout allows for a larger state"
        )

    def _lost(self, cause: BaseException) -> SourceLost:
        return SourceLost(f"replica rank {self._rank}, the source, was lost: {cause}")


def message_of(data: bytes) -> torch.Tensor:
    """A message of these bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
