"""The one background event loop of the process.

Servers, heartbeats and timers of every Manager in this process run on one asyncio loop in one daemon thread,
started at first use. Threads that want something done there use :func:`submit` (a coroutine, answered by a
``concurrent.futures.Future``) or :func:`call_later`.

Rules: nothing on the loop may block; whoever starts a task owns it and cancels it. A forked child starts without
a loop and makes its own if it asks for one.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["Timer", "call_later", "get_loop", "on_loop", "submit"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def get_loop() -> asyncio.AbstractEventLoop:
    """The loop, started if it is not running."""
    global _loop, _thread
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_run, args=(_loop,), name="torchft-loop", daemon=True)
            _thread.start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def on_loop() -> bool:
    """Whether the calling thread is the loop's: it must not block."""
    return threading.current_thread() is _thread


def submit(coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Runs a coroutine on the loop; the future carries its result, and cancelling it cancels the coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine, get_loop())


class Timer:
    """A callback that is due at some time, unless cancelled."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """After this the callback is not called, unless it is being called right now."""
        self.callback = None


class _Timers:
    """Many timers, nearly all of them cancelled before they are due: the timeout of each collective.

    So cancelling only clears the callback, and adding wakes the loop only if the new timer is the earliest. A
    step that adds and cancels timeouts of the same length never wakes it. Cancelled entries are dropped when
    they come due or when they are more than half of the heap.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._compact_at = 256
        self._wake_at = float("inf")
        self._handle: asyncio.TimerHandle | None = None  # of the loop's thread alone

    def add(self, delay: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(time.monotonic() + max(0.0, delay), callback)
        with self._lock:
            heapq.heappush(self._heap, (timer.due, next(self._count), timer))
            if len(self._heap) > self._compact_at:
                self._heap = [entry for entry in self._heap if entry[2].callback is not None]
                heapq.heapify(self._heap)
                self._compact_at = max(256, 2 * len(self._heap))
            earliest = timer.due < self._wake_at
            if earliest:
                self._wake_at = timer.due
        if earliest:
            get_loop().call_soon_threadsafe(self._arm)
        return timer

    def _arm(self) -> None:
        # One wake-up at a time, always at the newest ``_wake_at``: two threads may add and arm in either order.
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        with self._lock:
            due = self._wake_at
        if due != float("inf"):
            self._handle = get_loop().call_later(max(0.0, due - time.monotonic()), self._fire)

    def _fire(self) -> None:
        ready: list[Timer] = []
        with self._lock:
            now = time.monotonic()
            while self._heap and (self._heap[0][0] <= now or self._heap[0][2].callback is None):
                ready.append(heapq.heappop(self._heap)[2])
            self._wake_at = self._heap[0][0] if self._heap else float("inf")
        self._arm()
        for timer in ready:
            callback, timer.callback = timer.callback, None
            if callback is not None:
                try:
                    callback()
                except Exception:
                    logger.exception("a timer's callback failed")


_timers = _Timers()


def call_later(delay: float, callback: Callable[[], None]) -> Timer:
    """Calls ``callback`` on the loop's thread after ``delay`` seconds, unless the returned timer is cancelled.

    The callback must not block. What it raises is logged.
    """
    return _timers.add(delay, callback)


def _stop() -> None:
    """At exit, after the servers' own: libraries tear down what the loop would still call."""
    if _loop is not None and _thread is not None and not on_loop():
        _loop.call_soon_threadsafe(_loop.stop)
        _thread.join(timeout=2)


atexit.register(_stop)


def _after_fork_in_child() -> None:
    global _lock, _loop, _thread, _timers
    _lock = threading.Lock()
    _loop = None
    _thread = None
    _timers = _Timers()


os.register_at_fork(after_in_child=_after_fork_in_child)
