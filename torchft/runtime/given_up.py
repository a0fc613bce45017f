"""How whoever works on an answer learns that nobody waits for it any more."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable

from torchft.runtime.worker import end_with

__all__ = ["Flag", "GivenUp", "Withdrawn"]


class Withdrawn(RuntimeError):
    """Nobody waits for the answer any more."""


class GivenUp:
    """Of one question. From any thread."""

    def __init__(self) -> None:
        self._said: concurrent.futures.Future[None] = concurrent.futures.Future()

    @property
    def said(self) -> bool:
        return self._said.done()

    def say(self) -> None:
        """Nobody waits any more. Idempotent."""
        end_with(self._said, None)

    def then(self, call: Callable[[], object]) -> None:
        """Calls ``call`` once it is said, on the thread that says it; now, if it was said before."""
        self._said.add_done_callback(lambda _: call())

    def check(self) -> None:
        """Raises :class:`Withdrawn` if it was said."""
        if self.said:
            raise Withdrawn("nobody waits for the answer any more")


class Flag:
    """An event for which one can stop waiting. From any thread."""

    def __init__(self) -> None:
        self._set = False
        self._changed = threading.Condition()

    def set(self) -> None:
        with self._changed:
            self._set = True
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._set = False

    def wait(self, timeout: float, given_up: GivenUp) -> bool:
        """Waits at most ``timeout`` seconds until it is set. Returns whether it is.

        Raises:
            Withdrawn: it was given up.
        """
        given_up.then(self._look)
        with self._changed:
            is_set = self._changed.wait_for(lambda: self._set or given_up.said, timeout)
        given_up.check()
        return is_set

    def _look(self) -> None:
        with self._changed:
            self._changed.notify_all()
