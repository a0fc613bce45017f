"""Timeouts for ``torch.futures.Future`` and for blocks of code, all on the process's one background loop.

Adding and removing a timeout costs microseconds and wakes no thread (:mod:`torchft.runtime.loop`), so each
collective of each step can have its own.

A future that fails keeps its error in C++, where Python's search for garbage does not see it. If that error has a
traceback whose frames know the future, both stay for ever, and with them tensors, works and connections. So errors are
given to futures by :func:`fail` and looked at by :func:`outcome`, which leave no traceback.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from torch.futures import Future

from torchft.runtime.deadline import seconds
from torchft.runtime.loop import call_later

__all__ = ["context_timeout", "ends", "fail", "future_timeout", "future_wait", "hand_on", "outcome"]

T = TypeVar("T")


def outcome(ended: Future[Any]) -> tuple[Any, Exception | None]:
    """The value of a future, or what it failed with."""
    try:
        return ended.value(), None
    except Exception as e:
        return None, e.with_traceback(None)


def fail(out: Future[Any], error: Exception) -> None:
    """``out`` ends with an error."""
    out.set_exception(error.with_traceback(None))


def hand_on(ended: Future[Any], out: Future[Any]) -> None:
    """``out`` ends as ``ended`` did."""
    value, error = outcome(ended)
    if error is None:
        out.set_result(value)
    else:
        fail(out, error)


def future_timeout(fut: Future[T], timeout: timedelta) -> Future[T]:
    """A future that does what ``fut`` does, or fails with ``TimeoutError`` when that takes longer than ``timeout``.

    Args:
        fut: is left alone: it may still complete later.
        timeout: from now.
    """
    out: Future[Any] = Future()
    claim = threading.Lock()  # whoever takes it completes `out`

    def expired() -> None:
        if claim.acquire(blocking=False):
            out.set_exception(TimeoutError(f"the future did not complete within {seconds(timeout):g} s"))

    timer = call_later(seconds(timeout), expired)

    def done(completed: Future[Any]) -> None:
        timer.cancel()
        if claim.acquire(blocking=False):
            hand_on(completed, out)

    fut.add_done_callback(done)
    return out


def ends(fut: Future[Any], timeout: timedelta) -> bool:
    """Whether the future ends, well or not, within ``timeout``."""
    done = threading.Event()

    def wake(_: Future[Any]) -> None:
        done.set()

    fut.add_done_callback(wake)
    return done.wait(seconds(timeout))


def future_wait(fut: Future[T], timeout: timedelta) -> T:
    """Waits for the future's value.

    Raises:
        TimeoutError: it did not complete within ``timeout``.
        Exception: what the future failed with.
    """
    if not ends(fut, timeout):
        raise TimeoutError(f"the future did not complete within {seconds(timeout):g} s")
    value: T = fut.wait()
    return value


@contextmanager
def context_timeout(callback: Callable[[], None], timeout: timedelta) -> Iterator[None]:
    """Calls ``callback`` if the block takes longer than ``timeout``: to abort what it waits for.

    Args:
        callback: called at most once, on another thread; it must not block.
        timeout: from entering the block.
    """
    timer = call_later(seconds(timeout), callback)
    try:
        yield
    finally:
        timer.cancel()
