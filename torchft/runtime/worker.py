"""Threads that carry out blocking calls in the background, and that never keep the interpreter from exiting.

Unlike ``ThreadPoolExecutor``, whose threads are joined at exit however long their call still takes: a process that
is told to end while it waits a minute for a quorum should end.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Worker", "carry_out", "end_with"]

T = TypeVar("T")
_Job = tuple["concurrent.futures.Future[Any]", Callable[[], Any]]


def carry_out(future: concurrent.futures.Future[T], call: Callable[[], T]) -> None:
    """Makes a call, unless its future was cancelled, and completes the future with what it returned or raised."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as e:
        future.set_exception(e)
        del future, call  # which the exception's traceback would keep, and with them itself
    else:
        future.set_result(result)


def end_with(future: concurrent.futures.Future[T], outcome: T | Exception) -> None:
    """Completes a future, unless it has ended: by another thread, or because whoever waited has cancelled it."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except concurrent.futures.InvalidStateError:
        pass


class Worker:
    """Carries out calls in the order in which they were submitted.

    Args:
        name: of its threads.
        threads: how many calls run at the same time.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> concurrent.futures.Future[T]:
        """The future of ``call()``.

        Raises:
            RuntimeError: the worker was shut down.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker was shut down")
            self._jobs.put((future, call))
        return future

    def shutdown(self, timeout: float = 0.0) -> bool:
        """Takes no more calls, lets those submitted end, waits ``timeout`` seconds for them. Idempotent.

        Returns:
            Whether all threads have ended.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            carry_out(*job)
            del job
