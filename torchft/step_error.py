"""The error of a step: the first thing that failed in it, whoever noticed it.

Collectives fail on the threads of their backend, timeouts on the loop, quorums on the manager's worker, and all of
them late, perhaps when the next step has begun. So an error belongs to the *attempt* in which the thing that failed
was begun, and one of an earlier attempt is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["StepError", "waited_in_vain"]


def waited_in_vain(error: Exception | None) -> bool:
    """Whether a step failed because another group did not answer in time, though its connections stand.

    Backends have no error of their own for it: gloo's and NCCL's say it in words.
    """
    if error is None:
        return False
    text = str(error).lower()
    return isinstance(error, TimeoutError) or "timed out" in text or "timeout" in text


class StepError:
    """From any thread.

    Args:
        on_first: called with the first error of an attempt, once, on the thread that reported it.
    """

    def __init__(self, on_first: Callable[[Exception], None]) -> None:
        self._on_first = on_first
        self._lock = threading.Lock()
        self._attempt = 0
        self._error: Exception | None = None

    @property
    def current(self) -> Exception | None:
        """The error of the attempt under way, None while there is none."""
        return self._error

    def begin(self) -> None:
        """The next attempt begins, without an error."""
        with self._lock:
            self._attempt += 1
            self._error = None

    def report(self, error: Exception) -> None:
        """Something failed in the attempt under way."""
        self._report(error, self._attempt)

    def reporter(self) -> Callable[[Exception], None]:
        """What something that begins now calls if it fails, however late."""
        attempt = self._attempt
        return lambda error: self._report(error, attempt)

    def _report(self, error: Exception, attempt: int) -> None:
        with self._lock:
            if self._error is not None or attempt != self._attempt:
                return
            self._error = error
        self._on_first(error)
