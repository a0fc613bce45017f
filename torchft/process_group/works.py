"""The work of a backend that tells how it ended only to whoever waits for it: a send or a receive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.futures import fail
from torchft.runtime.tracebacks import anew

__all__ = ["PointToPointWork"]

_NO_TIMEOUT = timedelta(milliseconds=0)


class PointToPointWork(Work):
    """Tells its group of a failure, and has a future where the backend has none.

    Args:
        work: the backend's. Its wait is bounded by the group's timeout.
        tensors: what is sent or received: the future's value.
        failed: told the exception that a wait ended with.
    """

    def __init__(self, work: Work, tensors: list[torch.Tensor], failed: Callable[[Exception], None]) -> None:
        super().__init__()
        self._work = work
        self._tensors = tensors
        self._failed = failed
        self._lock = threading.Lock()
        self._future: Future[Any] | None = None
        self._error: Exception | None = None
        self._done = False

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Waits until the tensors are sent or there; ``timeout`` 0 means the group's.

        Raises:
            RuntimeError: the group failed, was aborted, or its timeout passed.
        """
        with self._lock:  # the backend's buffer takes one waiter
            if self._error is not None:
                raise anew(self._error)
            if not self._done:
                try:
                    self._work.wait(timeout) if timeout > _NO_TIMEOUT else self._work.wait()
                except Exception as e:
                    self._error = anew(e)
                    self._failed(self._error)
                    raise
                self._done = True
        return True

    def is_completed(self) -> bool:
        return self._done or self._error is not None

    def get_future(self) -> Future[Any]:
        """A future of the tensors. It takes a thread that waits; the group's timeout ends it."""
        if self._future is None:
            self._future = Future()
            if self._done:
                self._future.set_result(self._tensors)
            else:
                threading.Thread(target=self._complete, args=(self._future,), name="torchft-p2p", daemon=True).start()
        return self._future

    def _complete(self, future: Future[Any]) -> None:
        try:
            self.wait()
        except Exception as e:
            fail(future, e)
        else:
            future.set_result(self._tensors)

    def result(self) -> list[torch.Tensor]:
        return self._tensors
