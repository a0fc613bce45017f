"""A gate between one writer and the readers of what it writes.

The training thread writes the model; a recovery thread reads it. While the gate is closed nobody begins to read,
and closing waits for those that read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torchft.runtime.deadline import Deadline

__all__ = ["Gate"]


class Gate:
    """Open at first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._open = True
        self._readers = 0

    def open(self) -> None:
        """Readers may begin."""
        with self._condition:
            self._open = True
            self._condition.notify_all()

    def close(self, timeout: float) -> None:
        """Nobody begins to read any more, and nobody reads when this returns.

        Raises:
            TimeoutError: a reader was still reading after ``timeout`` seconds. The gate is closed all the same.
        """
        deadline = Deadline(timeout)
        with self._condition:
            self._open = False
            if not self._condition.wait_for(lambda: self._readers == 0, deadline.remaining()):
                raise TimeoutError(f"the state is still being read after {timeout:g} s")

    @contextmanager
    def reading(self, timeout: float) -> Iterator[None]:
        """Waits for the gate to open and holds it open meanwhile.

        Raises:
            TimeoutError: it stayed closed for ``timeout`` seconds.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._open, timeout):
                raise TimeoutError(f"the state could not be read for {timeout:g} s: it is being written")
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()
