"""Works that their backend may forget when its connections end.

The idea
    Gloo tells an operation that waits for a connection when that has ended, but forgets those of which a part is on
    its way: a receive in the middle of a message, a send that did not fit into the kernel's buffers. They wait for
    their timeout, in C++. So what users hold is a work of ours: a moment after an abort it ends, whatever became of
    the backend's.

Invariants
    - A work that the backend ends itself ends as the backend says.
    - A work that is given up was aborted at least :data:`GRACE` ago. Its connections are gone by then: nothing is
      written into its tensors any more.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.futures import fail, hand_on
from torchft.process_group.base import ProcessGroupError
from torchft.runtime.deadline import Deadline
from torchft.runtime.tracebacks import anew, without_frames

__all__ = ["GRACE", "Ending", "LosableCollective", "LosablePointToPoint"]

GRACE = 0.1
"""Seconds from an abort until works that have not ended by then are given up."""

_NO_TIMEOUT = timedelta(milliseconds=0)
_SLICE = timedelta(milliseconds=50)


class Ending:
    """Tells the works of a session when they are given up."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._lock = threading.Lock()
        self._listeners: set[Callable[[Exception], None]] = set()

    def listen(self, listener: Callable[[Exception], None]) -> None:
        """``listener`` is called once with the error, unless :meth:`leave` comes first."""
        with self._lock:
            if self.error is None:
                self._listeners.add(listener)
                return
        listener(self.error)

    def leave(self, listener: Callable[[Exception], None]) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def give_up(self, reason: str) -> None:
        """All works that have not ended are lost. The first reason counts."""
        with self._lock:
            if self.error is not None:
                return
            error = self.error = ProcessGroupError(reason)
            listeners, self._listeners = self._listeners, set()
        for listener in listeners:
            listener(error)


class LosableCollective(Work):
    """A collective of the backend.

    Args:
        work: the backend's.
        ending: of its session.
    """

    def __init__(self, work: Work, ending: Ending) -> None:
        super().__init__()
        self._work = work
        self._ending = ending
        self._lock = threading.Lock()
        self._future: Future[Any] | None = None
        self._settled = False

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Waits for the collective; ``timeout`` 0 means the group's.

        Raises:
            RuntimeError: it failed, was aborted, or did not end in time.
        """
        deadline = Deadline(timeout) if timeout > _NO_TIMEOUT else None
        while True:
            piece = _SLICE if deadline is None else min(_SLICE, timedelta(seconds=max(0.001, deadline.remaining())))
            try:
                return self._work.wait(piece)
            except RuntimeError:
                if self._work.is_completed():
                    return self._work.wait()  # raises what it failed with
                if self._ending.error is not None:
                    raise self._ending.error from None
                if deadline is not None and deadline.expired:
                    raise

    def is_completed(self) -> bool:
        return self._work.is_completed() or self._ending.error is not None

    def is_success(self) -> bool:
        return self._work.is_completed() and bool(self._work.is_success())

    def exception(self) -> Any:
        return self._work.exception() if self._work.is_completed() else self._ending.error

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        return self._work.result()

    def get_future(self) -> Future[Any]:
        """The backend's future, which also ends when the collective is given up."""
        with self._lock:
            if self._future is not None:
                return self._future
            backends: Future[Any] = self._work.get_future()
            if backends.done():
                self._future = backends
                return backends
            self._future = Future()
        self._ending.listen(self._lose)
        backends.add_done_callback(self._copy)
        return self._future

    def _claim(self) -> bool:
        with self._lock:
            first, self._settled = not self._settled, True
        return first

    def _copy(self, backends: Future[Any]) -> None:
        self._ending.leave(self._lose)
        if self._claim():
            assert self._future is not None
            hand_on(backends, self._future)

    def _lose(self, error: Exception) -> None:
        if self._claim():
            assert self._future is not None
            fail(self._future, error)


class _Waiter(threading.Thread):
    """A thread that carries out one wait after the other: starting one for each takes longer than a small message."""

    def __init__(self) -> None:
        super().__init__(name="torchft-p2p", daemon=True)
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self.jobs.get()()
            _idle.append(self)


_idle: deque[_Waiter] = deque()


def _in_background(job: Callable[[], None]) -> None:
    """On a thread that does nothing else meanwhile: as many as there are waits at the same time."""
    try:
        waiter = _idle.pop()
    except IndexError:
        waiter = _Waiter()
    waiter.jobs.put(job)


class LosablePointToPoint(Work):
    """A send or a receive of the backend, which a thread waits for.

    Args:
        work: the backend's. Its wait is bounded by the group's timeout.
        tensors: what is sent or received: the future's value.
        failed: told the exception that it ended with.
        ending: of its session.
    """

    def __init__(
        self, work: Work, tensors: list[torch.Tensor], failed: Callable[[Exception], None], ending: Ending
    ) -> None:
        super().__init__()
        self._work = work
        self._tensors = tensors
        self._failed = failed
        self.ending = ending
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._error: Exception | None = None
        self._begun = False
        self._future: Future[Any] | None = None

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Waits until the tensors are sent or there; ``timeout`` 0 means the group's.

        Raises:
            RuntimeError: the group failed, was aborted, or its timeout passed.
        """
        self._begin(timeout)
        self._over.wait()
        if self._error is not None:
            raise anew(self._error)
        return True

    def wait_here(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """As :meth:`wait`, but on the calling thread alone, and as long as the backend waits, whatever becomes of the
        group: for a thread that nobody waits for once :attr:`ending` has told that the works are given up.
        """
        with self._lock:
            begun, self._begun = self._begun, True
        if not begun:
            self._run(timeout)
        return self.wait(timeout)

    def is_completed(self) -> bool:
        return self._over.is_set()

    def get_future(self) -> Future[Any]:
        """A future of the tensors; the group's timeout ends it."""
        with self._lock:
            if self._future is not None:
                return self._future
            future = self._future = Future()
            over = self._over.is_set()
        if over:
            self._complete(future)
        else:
            self._begin(_NO_TIMEOUT)
        return future

    def result(self) -> list[torch.Tensor]:
        return self._tensors

    def _begin(self, timeout: timedelta) -> None:
        with self._lock:  # the backend's buffer takes one waiter
            if self._begun:
                return
            self._begun = True
        self.ending.listen(self._finish)
        _in_background(lambda: self._run(timeout))

    def _run(self, timeout: timedelta) -> None:
        error: Exception | None = None
        try:
            self._work.wait(timeout) if timeout > _NO_TIMEOUT else self._work.wait()
        except Exception as e:
            error = without_frames(e)
        self.ending.leave(self._finish)
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._error = error
            self._over.set()
            future = self._future
        if error is not None:
            self._failed(error)
        if future is not None:
            self._complete(future)

    def _complete(self, future: Future[Any]) -> None:
        if self._error is not None:
            fail(future, self._error)
        else:
            future.set_result(self._tensors)


os.register_at_fork(after_in_child=_idle.clear)  # a child has none of the threads
