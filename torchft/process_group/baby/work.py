"""The work of a collective that another process does."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.futures import fail
from torchft.process_group.base import ProcessGroupError
from torchft.runtime.tracebacks import anew

__all__ = ["BabyWork"]

_NO_TIMEOUT = timedelta(milliseconds=0)


class BabyWork(Work):
    """Done when the outcome is in the tensors. On a GPU ``wait()`` then makes the current stream wait for the copy.

    Args:
        result: the future's value.
    """

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._error: Exception | None = None
        self._event: torch.Event | None = None
        self._future: Future[Any] | None = None

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Waits for the outcome; ``timeout`` 0 means the group's.

        Raises:
            RuntimeError: it failed, was aborted, or did not end in time.
        """
        if not self._over.wait(timeout.total_seconds() if timeout > _NO_TIMEOUT else None):
            raise ProcessGroupError(f"the collective did not end within {timeout.total_seconds():g} s")
        if self._error is not None:
            raise anew(self._error)
        if self._event is not None:
            torch.accelerator.current_stream(self._event.device).wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        return self._over.is_set()

    def is_success(self) -> bool:
        return self._over.is_set() and self._error is None

    def exception(self) -> Any:
        return self._error

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        return self._result if isinstance(self._result, list) else [self._result]

    def get_future(self) -> Future[Any]:
        """A future of the tensors."""
        with self._lock:
            if self._future is None:
                devices = {t.device for t in _tensors(self._result) if t.device.type != "cpu"}
                self._future = Future(devices=sorted(devices, key=str)) if devices else Future()
                if self._over.is_set():
                    self._complete(self._future)
            return self._future

    def finish(self, error: Exception | None, event: torch.Event | None) -> None:
        """It has ended.

        Args:
            error: what it failed with.
            event: on a GPU, after the outcome's copy.
        """
        self._error = error
        self._event = event
        with self._lock:
            self._over.set()
            future = self._future
        if future is not None:
            self._complete(future)

    def _complete(self, future: Future[Any]) -> None:
        if self._error is not None:
            fail(future, self._error)
        elif self._event is None:
            future.set_result(self._result)
        else:
            stream = torch.Stream(self._event.device)
            stream.wait_event(self._event)
            with stream:  # what waits for the future waits for this stream
                future.set_result(self._result)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]
