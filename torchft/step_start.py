"""Where a step begins, and who waits for it: beside the training thread, on it, or not at all.

The idea
    The beginning of a step (:mod:`torchft.quorum_phase`) runs on a background thread while the forward pass computes,
    and whoever needs its result waits. With a synchronous quorum it runs on the training thread: handing it to another
    one and back takes as long as half a quorum. A step that stands has begun before anybody asks.

Rules
    - A step that stands is begun once more, by asking, when a member is lost before anything of the step has used its
      quorum. Waiting for the beginning is using it: from then on the loss is the step's error.
    - While the training thread waits, it makes the calls that only it may make (:mod:`torchft.training_thread`).
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable

from torchft.runtime.worker import Worker
from torchft.training_thread import Caller, TrainingThread, directly

__all__ = ["StepStart"]

_DONE: concurrent.futures.Future[None] = concurrent.futures.Future()
_DONE.set_result(None)


class StepStart:
    """The beginnings of a manager's steps, one after the other.

    Args:
        beside: they run on a background thread.
    """

    def __init__(self, beside: bool) -> None:
        self._beside = beside
        self._worker = Worker("torchft-quorum")
        self._training_thread = TrainingThread()
        self._lock = threading.Lock()
        self._over: concurrent.futures.Future[None] | None = None
        self._used = True  # the step's quorum was, or is none that stood

    @property
    def caller(self) -> Caller:
        """Makes a call on the training thread, for what runs in a beginning."""
        return self._training_thread.call if self._beside else directly

    @property
    def called(self) -> bool:
        """There was a step."""
        return self._over is not None

    def open(self, again: bool) -> None:
        """A step begins, on the training thread, and stands for the time being.

        Args:
            again: it may be begun once more by :meth:`again`.
        """
        self._over, self._used = _DONE, not again

    def run(self, begin: Callable[[], None]) -> None:
        """It does not stand: begins it."""
        self._used = True
        if self._beside:
            self._over = self._worker.submit(begin)
        else:
            begin()

    def again(self, reset: Callable[[], None], begin: Callable[[], None]) -> bool:
        """A member of the standing quorum is lost: begins the step once more, if nothing has used it yet.

        Args:
            reset: called first.
            begin: run on the background thread.

        Returns:
            Whether that was possible.
        """
        with self._lock:
            if self._used:
                return False
            self._used = True
            reset()
            self._over = self._worker.submit(begin)
            return True

    def wait(self, collective: bool = False) -> None:
        """Waits until the step has begun; each wait inside has a deadline of its own.

        Args:
            collective: a collective runs next, see :meth:`TrainingThread.wait`.
        """
        with self._lock:
            self._used = True
            over = self._over
        if over is not None:
            self._training_thread.wait(over, collective)
            over.result()

    def here(self) -> None:
        """This is the training thread."""
        self._training_thread.begin()

    def await_end(self, timeout: float) -> None:
        """Lets a beginning under way end first, for as many seconds."""
        if self._over is not None:
            concurrent.futures.wait([self._over], timeout=timeout)

    def shutdown(self, timeout: float) -> None:
        """Ends the background thread, for which ``timeout`` seconds are waited."""
        self._worker.shutdown(timeout=timeout)
