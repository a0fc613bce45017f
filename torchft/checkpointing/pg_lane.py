"""The thread on which a transfer over a process group waits for its messages.

The idea
    A work of a group whose backend may forget works (:mod:`torchft.process_group.lost_works`) has another thread wait
    for the backend, so that an abort can end the wait: two changes of threads for each message, which is what a
    transfer consists of. So the transfer as a whole moves to a thread that may be lost, and waits there itself.

Rules
    - The caller waits for the thread, or until the group has given up its works.
    - It returns only when the thread is done, or inside a wait. A thread that was left there does nothing more when
      the wait ends but end itself: memory that the transfer wrote to is the caller's again.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, cast

from torch.distributed import Work

__all__ = ["Ending", "Lane", "Lost", "ending_of"]


class Lost(Exception):
    """The group gave its works up. The cause says why."""


class Ending(Protocol):
    """What tells that a group's works are given up."""

    def listen(self, listener: Callable[[Exception], None]) -> None: ...

    def leave(self, listener: Callable[[Exception], None]) -> None: ...


def ending_of(work: Work) -> Ending | None:
    """Tells when a work of this group is given up; None: its waits end by themselves, and need no thread."""
    return cast("Ending | None", getattr(work, "ending", None))


class Lane:
    """See the module. For one job.

    Args:
        ending: of the group.
    """

    def __init__(self, ending: Ending) -> None:
        self._ending = ending
        self._turn = threading.Lock()  # the thread's, but inside of waits
        self._stirred = threading.Event()
        self._over = False
        self._left = False
        self._given_up: Exception | None = None
        self._error: BaseException | None = None

    def run(self, job: Callable[[], None], name: str) -> None:
        """Runs ``job`` on the thread, whose waits are :meth:`wait`.

        Raises:
            Lost: the group gave its works up while the job waited for one.
            Exception: what the job raised.
        """
        context = contextvars.copy_context()  # whoever speaks here speaks there
        thread = threading.Thread(target=context.run, args=(self._run, job), name=name, daemon=True)
        self._ending.listen(self._give_up)
        try:
            thread.start()
            self._stirred.wait()  # the job's own waits have deadlines
        finally:
            self._ending.leave(self._give_up)
            with self._turn:  # it is inside a wait now, has not begun, or is done
                self._left = True
        if self._over:
            thread.join()
            error, self._error = self._error, None
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # which has this frame
        else:
            raise Lost(str(self._given_up)) from self._given_up

    def wait(self, work: Work, timeout: timedelta) -> None:
        """Waits for a work of the group on the job's thread, which holds nothing of the job meanwhile.

        Raises:
            Lost: nobody waits for the job any more.
            RuntimeError: the group failed, or its timeout passed.
        """
        self._turn.release()
        try:
            getattr(work, "wait_here", work.wait)(timeout)  # what wraps a group may wrap some of its works
        finally:
            self._turn.acquire()
            if self._left:
                raise Lost("nobody waits for it any more")

    def _run(self, job: Callable[[], None]) -> None:
        with self._turn:
            try:
                if not self._left:
                    job()
            except BaseException as e:
                self._error = e
            self._over = not self._left
        self._stirred.set()

    def _give_up(self, error: Exception) -> None:
        self._given_up = error
        self._stirred.set()
