"""``Work`` objects of our own: what a collective returns, without or beside a backend's.

``torch.distributed`` returns a ``Work`` from each asynchronous collective: ``wait()`` blocks the host (CPU) or the
current stream (CUDA), ``get_future()`` gives a ``torch.futures.Future`` of the result.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

__all__ = ["CompletedWork", "FutureWork", "completed"]

_NO_TIMEOUT = timedelta(milliseconds=0)


class FutureWork(Work):
    """The work of a future: done when it is done, failed with what it failed with.

    Args:
        future: its value is the result of the collective.
    """

    def __init__(self, future: Future[Any]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Waits for the future. Raises what it failed with; ``timeout`` 0 waits without a limit of its own.

        Raises:
            TimeoutError: ``timeout`` passed first.
        """
        if timeout > _NO_TIMEOUT and not self._future.done():
            from torchft.futures import future_wait

            future_wait(self._future, timeout)
            return True
        self._future.wait()
        return True

    def get_future(self) -> Future[Any]:
        return self._future

    def is_completed(self) -> bool:
        return self._future.done()

    def result(self) -> list[torch.Tensor]:
        value = self._future.value()
        return value if isinstance(value, list) else [value]


class CompletedWork(FutureWork):
    """Work that was done before it was asked for: a no-op collective, or one of a group of one.

    Args:
        result: the future's value.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(completed(result))


def completed(result: Any) -> Future[Any]:
    """A future that already has its value."""
    future: Future[Any] = Future()
    future.set_result(result)
    return future
