"""Timeouts of collectives that a device carries out: they follow the stream, and no thread waits for the device.

The idea
    On a GPU a collective is queued, not done, when the call returns: behind whatever the stream still has to compute,
    which may take long for good reasons. So its time begins when the device reaches it, which an event tells that is
    recorded just before. One thread looks at those events now and then; the training thread only records them.

Rules
    1. A collective is *waiting* until its event is done, *running* until its work has completed. Only running counts.
    2. The first one that fails or runs longer than its timeout is told, once; what is watched with it is forgotten.
    3. Nothing is watched: no thread looks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Completes", "StreamWatch"]

_SHORTEST_LOOK = 0.005
_LONGEST_LOOK = 1.0
_LOOKS = 50  # in a timeout


class Completes(Protocol):
    """What of an event is used here."""

    def query(self) -> bool: ...


class _Watched:
    __slots__ = ("began", "completed", "name", "reached", "timeout")

    def __init__(self, name: str, reached: Completes, completed: Callable[[], bool], timeout: float) -> None:
        self.name = name
        self.reached = reached
        self.completed = completed
        self.timeout = timeout
        self.began: float | None = None


class StreamWatch:
    """Watches the collectives of one session.

    Args:
        expired: told the error, on the watching thread: it aborts the session.
        clock: seconds, for tests.
    """

    def __init__(self, expired: Callable[[Exception], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._expired = expired
        self._clock = clock
        self._changed = threading.Condition()
        self._watched: list[_Watched] = []
        self._thread: threading.Thread | None = None

    def watch(self, name: str, reached: Completes, completed: Callable[[], bool], timeout: float) -> None:
        """Watches a collective that was issued just now.

        Args:
            name: for the error.
            reached: an event, recorded on the stream before the collective.
            completed: whether the device has done it; raises what it failed with.
            timeout: seconds, from when the device reaches it.
        """
        with self._changed:
            self._watched.append(_Watched(name, reached, completed, timeout))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="torchft-stream-watch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Watches nothing any more."""
        with self._changed:
            self._watched.clear()
            self._changed.notify_all()

    def look(self) -> Exception | None:
        """Looks once: forgets what has completed; the error of what has failed or run too long."""
        with self._changed:
            watched = list(self._watched)
        now = self._clock()
        done: list[_Watched] = []
        error: Exception | None = None
        for one in watched:
            try:
                completed = one.completed()
                if not completed and one.began is None and one.reached.query():
                    one.began = now
            except Exception as e:
                error = e
                break
            if completed:
                done.append(one)
            elif one.began is not None and now - one.began > one.timeout:
                error = TimeoutError(f"{one.name} runs on the device for longer than {one.timeout:g} s")
                break
        with self._changed:
            self._watched = [] if error is not None else [one for one in self._watched if one not in done]
        return error

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watched:
                    self._thread = None
                    return
                shortest = min(one.timeout for one in self._watched)
                self._changed.wait(min(_LONGEST_LOOK, max(_SHORTEST_LOOK, shortest / _LOOKS)))
            error = self.look()
            if error is not None:
                self._expired(error)
