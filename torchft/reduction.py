"""One collective of a step as a future that always completes.

The sum comes from the process group, the division is done here when it arrives, and a failure or a timeout is
handed to the step instead of to whoever waits: torch DDP's reducer never sees a failed bucket, so it comes out of a
failed step as good as new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import AllreduceOptions, ReduceOp
from torch.futures import Future

from torchft.process_group import ProcessGroup
from torchft.runtime.loop import call_later
from torchft.work import completed as completed_future

__all__ = ["reduce"]


def reduce(
    pg: ProcessGroup,
    tensor: torch.Tensor,
    op: ReduceOp.RedOpType,
    *,
    divisor: int,
    timeout: float,
    on_error: Callable[[Exception], None],
) -> tuple[Future[torch.Tensor], Future[Any]]:
    """Reduces ``tensor`` in place over ``pg``.

    Args:
        pg: a configured process group.
        tensor: any shape.
        op: what the group is asked for.
        divisor: the result is divided by it, where it is not 1.
        timeout: seconds after which the step has an error, whatever the group's own timeout is.
        on_error: told what failed, at most once, before the future completes.

    Returns:
        A future of ``tensor``, which never fails; and the collective's own, which is done when the collective no
        longer touches the tensor.
    """
    options = AllreduceOptions()
    options.reduceOp = ReduceOp(op)
    try:
        fut: Future[Any] = pg.allreduce([tensor], options).get_future()
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
        try:
            completed.value()
            if divisor != 1:
                tensor.div_(divisor)
        except Exception as e:
            on_error(e)
        out.set_result(tensor)

    fut.add_done_callback(done)
    return out, fut


def _on_stream(
    fut: Future[Any], tensor: torch.Tensor, divisor: int, on_error: Callable[[Exception], None]
) -> Future[torch.Tensor]:
    """The same for an accelerator: the division follows the collective on the future's own stream."""

    def done(completed: Future[Any]) -> torch.Tensor:
        try:
            completed.value()
            if divisor != 1:
                tensor.div_(divisor)
        except Exception as e:
            on_error(e)
        return tensor

    chained: Future[torch.Tensor] = fut.then(done)
    return chained
