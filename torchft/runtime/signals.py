"""Noting in the main thread that a signal to end has come, and waiting for one.

A main thread that waits for a lock (``Event.wait``, ``Queue.get``) can miss a signal for good: one that comes between
Python's last look at its signals and the kernel's wait, or that the kernel hands to another thread, runs its handler
only when the wait is over. A file descriptor that the C handler writes to has no such gap.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Collection
from types import FrameType, TracebackType

from torchft.runtime.deadline import Deadline
from torchft.runtime.ready import readable

__all__ = ["EndSignals"]


class EndSignals:
    """Inside its ``with`` block the signals interrupt nothing: they end :meth:`wait`.

    Args:
        numbers: of the signals.

    Raises:
        ValueError: entered in another thread than the main one.
    """

    def __init__(self, numbers: Collection[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self._numbers = numbers
        self._came = False

    def __enter__(self) -> EndSignals:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        try:
            self._former_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        except ValueError:
            self._close()
            raise
        self._former = {number: signal.signal(number, _ignore) for number in self._numbers}
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Whether one has come, before or within ``timeout`` seconds."""
        deadline = None if timeout is None else Deadline(timeout)
        while not self._came:
            if not readable(self._read, None if deadline is None else deadline.remaining()):
                break
            # The descriptor gets every signal that has a handler in Python.
            self._came = not set(self._read.recv(4096)).isdisjoint(self._numbers)
        return self._came

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._former_fd)
        self._close()

    def _close(self) -> None:
        self._read.close()
        self._write.close()


def _ignore(number: int, frame: FrameType | None) -> None:
    """It is in the descriptor. With SIG_IGN it would not be."""
