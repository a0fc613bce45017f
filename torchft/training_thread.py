"""Calls that only the training thread may make, asked for by the manager's background thread.

The idea
    Quorum and healing run beside the forward pass, and so does the reading of the state; but a function that runs
    collectives inside the group must be called where the group's ranks run all their collectives: on the training
    thread, in the same order on every rank. That thread comes to wait for the quorum anyway: at the step's first
    collective, at the vote, or at :meth:`Manager.wait_quorum`. While it waits, it carries out what it is asked for.

Rules
    - One call at a time. It is carried out once, or given up at its deadline.
    - The training thread is the one that begins the steps; and one that runs a collective for it, as autograd does.
      Others that wait make no calls.
    - What the call raises is raised where it was asked for, not in the training loop.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torchft.runtime.deadline import Deadline
from torchft.runtime.worker import carry_out

__all__ = ["Caller", "TrainingThread", "directly"]

T = TypeVar("T")
_Job = tuple["concurrent.futures.Future[Any]", Callable[[], Any]]


class Caller(Protocol):
    """Carries out a call on the training thread and returns what it returned."""

    def __call__(self, call: Callable[[], T], timeout: float) -> T: ...


def directly(call: Callable[[], T], timeout: float) -> T:
    """The :class:`Caller` of who is on the training thread already."""
    return call()


class TrainingThread:
    """Both sides of it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._job: _Job | None = None
        self._ident: int | None = None

    def begin(self) -> None:
        """This is the training thread."""
        self._ident = threading.get_ident()

    def call(self, call: Callable[[], T], timeout: float) -> T:
        """Has the training thread make a call. Not to be used on that thread itself.

        Args:
            call: what to carry out.
            timeout: seconds until it must have been begun.

        Raises:
            TimeoutError: the training thread did not come to wait for the quorum in time.
            Exception: what ``call`` raised.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        deadline = Deadline(timeout)
        with self._changed:
            assert self._job is None, "one call at a time"
            self._job = future, call
            self._changed.notify_all()
        try:
            return future.result(timeout=deadline.remaining())
        except concurrent.futures.TimeoutError:
            if future.cancel():
                raise TimeoutError(
                    f"the training thread did not come within {timeout:g} s to make a call that only it may make: "
                    f"a state dict function with on_training_thread=True. It does where it waits for the quorum: at "
                    f"the step's first allreduce, at should_commit() or at wait_quorum()"
                ) from None
            return future.result()  # it has begun, or it ended with a TimeoutError of its own
        finally:
            with self._changed:
                self._job = None
            del future  # whose exception has this frame

    def wait(self, until: concurrent.futures.Future[Any], collective: bool) -> None:
        """Waits for something, and meanwhile makes the calls that are asked for.

        Args:
            until: what is waited for.
            collective: a collective runs next: wherever this is, it is on the training thread's behalf.
        """
        if until.done():
            return
        if not collective and threading.get_ident() != self._ident:
            concurrent.futures.wait([until])
            return
        until.add_done_callback(self._wake)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: until.done() or self._job is not None)
                if self._job is None:
                    return
                job, self._job = self._job, None
            carry_out(*job)
            del job  # whose exception has this frame

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()
