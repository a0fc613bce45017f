"""The collectives of a step as futures that always complete.

The sum comes from the process group, the division is done here when it arrives, and a failure or a timeout is
handed to the step instead of to whoever waits: torch DDP's reducer never sees a failed bucket, so it comes out of a
failed step as good as new.

On an accelerator a collective is issued, not done, when its future is: how it ends is known when the device has come so
far. So the end of a step waits for the device, once.

What a step issues goes through a lane (:mod:`torchft.lane`), in which a quantized collective, which has two
steps, keeps its place among the others. A step has a lane of its own, closed at its end: nothing of it is issued in
the next one.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import AllreduceOptions, ReduceOp
from torch.futures import Future

from torchft.collectives import allreduce_quantized
from torchft.futures import ends, future_timeout, outcome
from torchft.lane import Lane
from torchft.process_group import ProcessGroup, Reduction
from torchft.runtime.deadline import Deadline
from torchft.runtime.loop import call_later
from torchft.step_error import StepError
from torchft.work import completed as completed_future

__all__ = ["StepFutures", "contribute_nothing", "reduce"]

T = TypeVar("T")
_ABORT_GRACE = timedelta(seconds=30)
_LOOK = 0.0002
"""Seconds between two looks at a device: what a step may lose by them."""
_LOOKS = 25
"""At a device, for one at the process group, which looks at each of its works."""


class StepFutures:
    """What the step under way has begun and must have ended before it is committed.

    Args:
        error: gets what fails.
    """

    def __init__(self, error: StepError) -> None:
        self._error = error
        self._futures: list[Future[Any]] = []
        self._collectives: list[Future[Any]] = []  # those whose end means that nothing writes to the tensor
        self._devices: set[torch.device] = set()  # other than the CPU, where they are carried out
        self._lane = Lane()
        self._unsafe = ""  # why nothing may be trained in this process any more

    @property
    def begun(self) -> bool:
        """Whether there is something."""
        return bool(self._futures)

    def check(self) -> None:
        """Nothing of an earlier step may still write to a tensor.

        Raises:
            RuntimeError: something may, as :meth:`wait` or :meth:`give_up` has said before.
        """
        if self._unsafe:
            raise RuntimeError(self._unsafe)

    def clear(self) -> None:
        """Forgets them all, and issues nothing of them any more: the next step begins."""
        self._lane.close()
        self._lane = Lane()
        self._futures.clear()
        self._collectives.clear()
        self._devices.clear()

    def reduce(
        self,
        pg: ProcessGroup,
        tensor: torch.Tensor,
        op: Reduction,
        divisor: int,
        timeout: float,
        quantized: bool = False,
    ) -> Future[torch.Tensor]:
        """As :func:`reduce`, in the step's lane, and with the step's error for what fails."""
        out, collective = reduce(
            pg,
            tensor,
            op,
            divisor=divisor,
            timeout=timeout,
            on_error=self._error.reporter(),
            lane=self._lane,
            quantized=quantized,
        )
        self._futures.append(out)
        self._collectives.append(collective)
        if tensor.device.type != "cpu":
            self._devices.add(tensor.device)
        return out

    def wrap(self, fut: Future[T], default: T, timeout: timedelta) -> Future[T]:
        """A future that completes with ``default`` where ``fut`` fails or takes longer than ``timeout``."""
        out: Future[T] = Future()
        on_error = self._error.reporter()

        def done(completed: Future[T]) -> None:
            value, error = outcome(completed)
            if error is not None:
                on_error(error)
                value = default
            out.set_result(value)

        future_timeout(fut, timeout).add_done_callback(done)
        self._futures.append(out)
        return out

    def wait(
        self,
        timeout: timedelta,
        abort: Callable[[], None],
        errored: Callable[[], Exception | None],
    ) -> None:
        """Until all of them have ended, well or not: after it none of them writes to a tensor but in the order of its
        device's stream.

        What fails or is late becomes the step's error.

        Args:
            timeout: after it ``abort`` must end what is still pending.
            abort: of the process group.
            errored: what the process group failed with; asked while a device is waited for.

        Raises:
            RuntimeError: something is pending even then. Its buffers must not be used again: from now on this raises
                the same error whenever it is called, and so does :meth:`check`.
        """
        self.check()
        deadline = Deadline(timeout)
        collectives = list(self._collectives)
        self._wait_for([*self._futures, *collectives], timeout)
        if self._devices:
            self._put_in_order()
            self._wait_for_devices(self._devices, deadline, errored)
        self.clear()
        self._end(collectives, abort)

    def give_up(self, abort: Callable[[], None]) -> None:
        """The step is left as it is: what is pending ends, and writes to no tensor that the next step uses.

        Args:
            abort: of the process group.

        Raises:
            RuntimeError: as of :meth:`wait`.
        """
        collectives = list(self._collectives)
        if self._devices:
            self._put_in_order()
            abort()  # how far the device is nobody knows
        self.clear()
        self._end(collectives, abort)

    def _end(self, collectives: list[Future[Any]], abort: Callable[[], None]) -> None:
        if all(future.done() for future in collectives):
            return
        abort()
        self._wait_for(collectives, _ABORT_GRACE)
        if not all(future.done() for future in collectives):
            self._unsafe = (
                f"a collective still runs {_ABORT_GRACE.total_seconds():g} s after the process group was aborted, "
                f"and may write to gradients at any time: this process cannot go on safely and must be restarted"
            )
            self.check()

    def _put_in_order(self) -> None:
        """What this thread's streams are given from now on comes after the collectives."""
        for future in self._futures:
            if future.done():
                future.wait()

    def _wait_for_devices(
        self, devices: Collection[torch.device], deadline: Deadline, errored: Callable[[], Exception | None]
    ) -> None:
        """Until they have done what this thread's streams have to do. An error ends it: the step is lost, and its
        collectives are torn down without us.
        """
        events = [torch.accelerator.current_stream(device).record_event() for device in devices]
        for look in itertools.count():
            if self._error.current is not None or all(event.query() for event in events):
                return
            if look % _LOOKS == 0 and (broken := errored()) is not None:
                self._error.report(broken)
            elif deadline.expired:
                late = f"the device has not carried out the step's collectives within {deadline.timeout:g} s"
                self._error.report(TimeoutError(late))
            else:
                time.sleep(_LOOK)

    def _wait_for(self, futures: list[Future[Any]], timeout: timedelta) -> None:
        deadline = Deadline(timeout)
        for future in futures:
            if future.done():
                continue
            if not ends(future, timedelta(seconds=deadline.remaining())):
                self._error.report(TimeoutError(f"the future did not complete within {deadline.timeout:g} s"))
            elif (error := outcome(future)[1]) is not None:
                self._error.report(error)


def contribute_nothing(tensor: torch.Tensor, op: Reduction) -> None:
    """Fills ``tensor`` with what changes no result of ``op``: zeros in a sum, ones in a product, the least number in
    a maximum, and so on.
    """
    if op == ReduceOp.PRODUCT:
        tensor.fill_(1)
    elif op == ReduceOp.BAND:
        tensor.zero_().bitwise_not_()
    elif op == ReduceOp.MAX or op == ReduceOp.MIN:
        if tensor.is_floating_point():
            least, most = -math.inf, math.inf
        elif tensor.dtype == torch.bool:
            least, most = False, True
        else:
            least, most = torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max
        tensor.fill_(least if op == ReduceOp.MAX else most)
    else:
        tensor.zero_()


def reduce(
    pg: ProcessGroup,
    tensor: torch.Tensor,
    op: Reduction,
    *,
    divisor: int,
    timeout: float,
    on_error: Callable[[Exception], None],
    lane: Lane,
    quantized: bool = False,
) -> tuple[Future[torch.Tensor], Future[Any]]:
    """Reduces ``tensor`` in place over ``pg``.

    Args:
        pg: a configured process group.
        tensor: any shape.
        op: what the group is asked for.
        divisor: the result is divided by it, where it is not 1.
        timeout: seconds after which the step has an error, whatever the group's own timeout is.
        on_error: told what failed, at most once, before the future completes.
        lane: where it has its turn.
        quantized: send one byte an element; SUM only, floating point only.

    Returns:
        A future of ``tensor``, which never fails; and the collective's own, which is done when the collective no
        longer touches the tensor.
    """
    try:
        if quantized:
            fut: Future[Any] = allreduce_quantized([tensor], op, pg, divisor=divisor, lane=lane).get_future()
            divisor = 1
        else:
            options = AllreduceOptions()
            options.reduceOp = op if isinstance(op, ReduceOp) else ReduceOp(op)
            fut = lane.run(lambda: pg.allreduce([tensor], options), tensor.device)
    except Exception as e:
        on_error(e)
        failed = completed_future(tensor)
        return failed, failed

    if tensor.device.type != "cpu":
        return _on_stream(fut, tensor, divisor, on_error), fut

    out: Future[torch.Tensor] = Future()
    claim = threading.Lock()  # whoever takes it completes `out`; after a timeout nobody touches the tensor

    def expired() -> None:
        if claim.acquire(blocking=False):
            on_error(TimeoutError(f"an allreduce of {tuple(tensor.shape)} did not complete within {timeout:g} s"))
            out.set_result(tensor)

    timer = call_later(timeout, expired)

    def done(completed: Future[Any]) -> None:
        timer.cancel()
        if not claim.acquire(blocking=False):
            return
        _divide(completed, tensor, divisor, on_error)
        out.set_result(tensor)

    fut.add_done_callback(done)
    return out, fut


def _on_stream(
    fut: Future[Any], tensor: torch.Tensor, divisor: int, on_error: Callable[[Exception], None]
) -> Future[torch.Tensor]:
    """The same for an accelerator: the division follows the collective on the future's own stream."""

    def done(completed: Future[Any]) -> torch.Tensor:
        _divide(completed, tensor, divisor, on_error)
        return tensor

    chained: Future[torch.Tensor] = fut.then(done)
    return chained


def _divide(completed: Future[Any], tensor: torch.Tensor, divisor: int, on_error: Callable[[Exception], None]) -> None:
    """What follows a collective. If it failed, that is the step's error."""
    _, error = outcome(completed)
    try:
        if error is None and divisor != 1:
            tensor.div_(divisor)
    except Exception as e:
        error = e
    if error is not None:
        on_error(error)
