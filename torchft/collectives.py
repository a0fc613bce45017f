"""Collectives that send one byte an element: :mod:`torchft.quantization` over any process group.

The idea
    An allreduce of n members takes two steps. Each member quantizes its tensors and sends the r-th part of the bytes
    to member r (alltoall). Member r sums the parts of all members in float32, quantizes the sum, and sends it to all
    (allgather). So 2 (n-1)/n bytes an element leave a member, where an exact float32 allreduce sends four times as
    many, and an element is rounded twice, however many members there are.

Rules
    1. All members end with the same bits: a part is quantized once more by its owner, and everybody, the owner too,
       decodes the same bytes.
    2. A group of one computes exactly.
    3. The tensors are read before the call returns and written when both steps have succeeded: one that fails leaves
       them as they were.
    4. Members must issue the collectives of a group in one order, and the second step is issued when the first has
       ended, which is at another moment on each member. So what is issued meanwhile waits in a :mod:`torchft.lane`.
    5. On a CPU one thread of the process goes on where a step has ended. The backend's own thread must not: it would
       compute instead of sending, and whoever drops the last reference to a process group waits for that thread.

Error of a sum over members i, with a_i the largest magnitude of the element's row at member i: at most
``sum(a_i) * (2 + 1/254) / 254`` for ``INT8``, ``sum(|x_i|) * (2 + 1/16) / 16 + sum(a_i) * 2.2 / 448 / 1024`` for
``FP8``, and what float32 and the tensor's own type round away.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import AllreduceOptions, ReduceOp, ReduceScatterOptions
from torch.distributed import Work
from torch.futures import Future

from torchft.futures import fail, outcome
from torchft.lane import Lane, after_this, future_on, lane_of
from torchft.process_group.base import ProcessGroup, Reduction, reduce_op_of
from torchft.quantization import ROW_LENGTH, SCALE_BYTES, Format, quantize, reduce, row_count, sum_into
from torchft.runtime.worker import Worker
from torchft.work import CompletedWork, FutureWork

__all__ = ["allreduce_quantized", "check_quantizable", "reduce_scatter_quantized", "wire_bytes"]

logger = logging.getLogger(__name__)

_EXIT_GRACE = 5.0  # seconds that a process that ends waits for the sum under way


def check_quantizable(tensors: Sequence[torch.Tensor], op: Any) -> None:
    """Raises ValueError where a quantized reduction of ``tensors`` with ``op`` is not possible."""
    if not (op == ReduceOp.SUM or op == ReduceOp.AVG):  # `in` asks the other side, which knows no ReduceOp objects
        raise ValueError(f"a quantized reduction can be SUM or AVG, not {op}")
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"a quantized reduction needs floating point tensors, not {tensor.dtype}")


def wire_bytes(numels: Sequence[int], world_size: int, row_length: int = ROW_LENGTH) -> int:
    """Bytes that each member sends in one :func:`allreduce_quantized`: about 2 (n-1)/n an element.

    Args:
        numels: elements of each tensor.
        world_size: members n.
        row_length: elements that share a scale.
    """
    rows = sum(-(-n // row_length) for n in numels)
    part = -(-rows // world_size)
    return 2 * (world_size - 1) * part * (SCALE_BYTES + row_length)


def allreduce_quantized(
    tensors: list[torch.Tensor],
    opts: AllreduceOptions | Reduction,
    process_group: ProcessGroup,
    *,
    divisor: float | None = None,
    format: Format | None = None,
    row_length: int = ROW_LENGTH,
    lane: Lane | None = None,
) -> Work:
    """Reduces each tensor over all members, in place, with about a quarter of the bytes.

    Returns when the first step is issued, or waits in the lane.

    Args:
        tensors: any shapes, strides and floating point types, on one device; shapes are the same on all members.
        opts: ``ReduceOp.SUM`` or ``AVG``, or options with one.
        process_group: a configured group.
        divisor: the sum is divided by it. By default 1 for SUM and the number of members for AVG.
        format: the same on all members; by default ``FP8`` on an accelerator and ``INT8`` on a CPU.
        row_length: elements that share a scale; the same on all members.
        lane: in which its steps are issued; by default that of ``process_group``.

    Returns:
        Work whose future's value is ``tensors``. It fails, once, with what either step failed with.

    Raises:
        ValueError: another reduction, or tensors that cannot be quantized.
    """
    op, members = reduce_op_of(opts), process_group.size()
    check_quantizable(tensors, op)
    if divisor is None:
        divisor = members if op == ReduceOp.AVG else 1
    if not tensors or row_count(tensors, row_length) == 0:
        return CompletedWork(tensors)
    device = tensors[0].device
    steps = _Steps(lane or lane_of(process_group), process_group, device, tensors)
    if members == 1:
        steps.only(lambda: process_group.allreduce(tensors, ReduceOp.SUM), lambda: _divide(tensors, divisor))
        return FutureWork(steps.out)

    format = format or _default_format(device)
    sent = quantize(tensors, format, row_length=row_length, multiple_of=members)
    received = torch.empty_like(sent)

    def summed() -> None:
        steps.use(received)
        mine = reduce(received.view(members, -1, received.shape[1]), format, divisor=divisor)
        # The bytes that were sent are not needed any more: the result's take their place.
        steps.last(lambda: process_group.allgather_into_tensor_coalesced([sent], [mine]), gathered)

    def gathered() -> None:
        steps.use(sent)
        sum_into(sent.unsqueeze(0), tensors, format)

    steps.first(lambda: process_group.alltoall_base(received, sent, [], []), summed)
    return FutureWork(steps.out)


def reduce_scatter_quantized(
    output: torch.Tensor,
    inputs: list[torch.Tensor],
    opts: ReduceScatterOptions | Reduction,
    process_group: ProcessGroup,
    *,
    divisor: float | None = None,
    format: Format | None = None,
    row_length: int = ROW_LENGTH,
    lane: Lane | None = None,
) -> Work:
    """``output`` becomes the reduction over all members of ``inputs[rank]``; one step, one rounding.

    Args:
        output: of the shape of each input, any floating point type; on the inputs' device.
        inputs: one tensor for each member.
        opts, process_group, divisor, format, row_length, lane: as for :func:`allreduce_quantized`.

    Returns:
        Work whose future's value is ``output``.

    Raises:
        ValueError: another reduction, tensors that cannot be quantized, or not one input of ``output``'s shape for
            each member.
    """
    op, members = reduce_op_of(opts), process_group.size()
    check_quantizable([output, *inputs], op)
    if len(inputs) != members or any(t.shape != output.shape for t in inputs):
        shapes = [tuple(t.shape) for t in inputs]
        raise ValueError(f"{members} inputs of shape {tuple(output.shape)} are needed, not {shapes}")
    if divisor is None:
        divisor = members if op == ReduceOp.AVG else 1
    if row_count([output], row_length) == 0:
        return CompletedWork(output)
    device = output.device
    steps = _Steps(lane or lane_of(process_group), process_group, device, output)
    if members == 1:
        call = functools.partial(process_group.reduce_scatter, [output], [inputs], ReduceOp.SUM)
        steps.only(call, lambda: _divide([output], divisor))
        return FutureWork(steps.out)

    format = format or _default_format(device)
    sent = quantize(inputs, format, row_length=row_length)  # each input begins on a row: equal parts
    received = torch.empty_like(sent)

    def arrived() -> None:
        steps.use(received)
        sum_into(received.view(members, -1, received.shape[1]), [output], format, divisor=divisor)

    steps.only(lambda: process_group.alltoall_base(received, sent, [], []), arrived)
    return FutureWork(steps.out)


class _Steps:
    """The steps of one collective: each begins with what the one before it ended with, and the first failure is the
    failure of all. What a step's closures refer to lives until it has ended.

    Args:
        result: value of the future ``out``.
    """

    def __init__(self, lane: Lane, process_group: ProcessGroup, device: torch.device, result: Any) -> None:
        self.out = future_on(device)
        self._lane = lane
        self._process_group = process_group
        self._device = device
        self._result = result

    def first(self, call: Callable[[], Work], then: Callable[[], None]) -> None:
        """Issues ``call`` in its turn; when it has succeeded, ``then``, which ends with :meth:`last`."""
        self._enter(call, then, leave=False)

    def only(self, call: Callable[[], Work], then: Callable[[], None]) -> None:
        """:meth:`first` and :meth:`last` in one."""
        self._enter(call, then, leave=True)

    def last(self, call: Callable[[], Work], then: Callable[[], None]) -> None:
        """Issues ``call``, and leaves the lane; when it has succeeded, ``then``, and the collective is done."""
        self._issue(call, then, leave=True)

    def use(self, buffer: torch.Tensor) -> None:
        """On an accelerator: the stream of this thread works with ``buffer``, which was made for another one."""
        if self._device.type != "cpu":
            buffer.record_stream(torch.accelerator.current_stream(self._device))

    def _enter(self, call: Callable[[], Work], then: Callable[[], None], leave: bool) -> None:
        in_order = after_this(self._device)

        def begin() -> None:
            in_order()
            self._issue(call, then, leave)

        self._lane.enter(begin)

    def _issue(self, call: Callable[[], Work], then: Callable[[], None], leave: bool) -> None:
        try:
            future = self._lane.issue(call).get_future()
        except Exception as e:
            self._lane.leave()
            fail(self.out, e)
            return
        if leave:
            self._lane.leave()
        if self._device.type != "cpu":  # its futures are done as soon as the stream knows what to do
            future.add_done_callback(lambda done: self.ended(done, then, last=leave))
            return
        token = next(_tokens)
        _under_way[token] = (self, then, leave)
        future.add_done_callback(lambda done: _go_on(token, done))

    def ended(self, done: Future[Any], then: Callable[[], None], last: bool) -> None:
        """A step has: what comes then."""
        _, error = outcome(done)
        try:
            error = error or self._process_group.errored()  # one that it keeps to itself: what arrived is of no use
            if error is None:
                then()
        except Exception as e:
            error = e
        if error is not None:
            if not last:
                self._lane.leave()
            fail(self.out, error)
        elif last:
            self.out.set_result(self._result)


# What the backend's thread knows of a step is a number, so that it never holds a process group.
_tokens = itertools.count()
_under_way: dict[int, tuple[_Steps, Callable[[], None], bool]] = {}


def _go_on(token: int, done: Future[Any]) -> None:
    try:
        _worker().submit(lambda: _resume(token, done))
    except RuntimeError:
        logger.debug("the process ends: a quantized collective is not gone on with")


def _resume(token: int, done: Future[Any]) -> None:
    steps, then, last = _under_way.pop(token)
    steps.ended(done, then, last)


@functools.cache
def _worker() -> Worker:
    worker = Worker("torchft-quantized")
    # It ends before the interpreter is taken apart: a thread that is inside of torch then would crash the process.
    atexit.register(worker.shutdown, _EXIT_GRACE)
    return worker


os.register_at_fork(after_in_child=_worker.cache_clear)  # a child has no such thread


def _default_format(device: torch.device) -> Format:
    return Format.INT8 if device.type == "cpu" else Format.FP8


def _divide(tensors: list[torch.Tensor], divisor: float) -> None:
    if divisor != 1:
        with torch.no_grad():
            for tensor in tensors:
                tensor.div_(divisor)
