"""A fault that lasts: it is there when the function that makes it returns, and ends when it is released.

Rules:

- An effect ends at the first of: ``release()``, the end of its ``with`` block, the end of its ``seconds``, the
  exit of the process that made it. Ending it again does nothing.
- A forked child does not end the effects of its parent.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType

__all__ = ["Effect"]

_logger = logging.getLogger("torchft.testing.faults")
_lock = threading.Lock()
_lasting: set[Effect] = set()


class Effect:
    """Something that was done and can be undone. A context manager.

    Args:
        what: it is, for the log.
        undo: ends it; called once at most, from any thread.
        seconds: after which it ends by itself; None: it lasts until released.
    """

    def __init__(self, what: str, undo: Callable[[], None], seconds: float | None = None) -> None:
        self._what = what
        self._undo: Callable[[], None] | None = undo
        self._owner = os.getpid()
        self._timer: threading.Timer | None = None
        with _lock:
            _lasting.add(self)
        if seconds is not None:
            self._timer = threading.Timer(seconds, self._end_by_itself)
            self._timer.name = "torchft-fault-end"
            self._timer.daemon = True
            self._timer.start()

    @property
    def active(self) -> bool:
        """Whether it still lasts."""
        return self._undo is not None

    def release(self) -> None:
        """Ends it. Idempotent.

        Raises:
            Exception: what undoing it failed with.
        """
        with _lock:
            undo, self._undo = self._undo, None
            _lasting.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if undo is not None and self._owner == os.getpid():
            _logger.info("ends: %s", self._what)
            undo()

    def _end_by_itself(self) -> None:
        try:
            self.release()
        except Exception:
            _logger.exception("could not be ended: %s", self._what)

    def __enter__(self) -> Effect:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _release_all() -> None:
    for effect in list(_lasting):
        effect._end_by_itself()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _lasting.clear()


atexit.register(_release_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
