"""Building a group on a thread of its own, so that whoever waits for it can walk away.

The idea
    A backend's constructor waits inside C++, and not every wait there can be ended from outside: an answer to a
    connection request that a host never sends, say. So it runs on a thread of its own. Whoever aborts it waits a
    moment for it to end, and then leaves it: the thread lets go of what it made when it ends by its own timeout.

Invariants
    - What was built belongs either to the waiter or, once it has been abandoned, to its thread: never to both.
    - No more than :data:`LIMIT` abandoned builds exist in the process.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from torchft.process_group.base import ProcessGroupError

__all__ = ["LIMIT", "Build", "end_builds"]

logger = logging.getLogger(__name__)

LIMIT = 64
"""Abandoned builds of this process that may wait for their own timeout at the same time."""

_lock = threading.Lock()
_abandoned: set[Build] = set()
_running: set[Build] = set()


class Build:
    """Runs ``call`` on a thread of its own, from now on.

    Args:
        call: builds something and keeps it.
        over: called when it has ended, in whichever way.
        name: for messages.

    Raises:
        ProcessGroupError: too many abandoned builds have not ended yet.
    """

    def __init__(self, call: Callable[[], None], over: Callable[[], None], name: str) -> None:
        self.error: Exception | None = None
        """What ``call`` raised; for whoever has seen it end."""
        self._call = call
        self._over = over
        self._name = name
        self._ended = threading.Event()
        self._drop: Callable[[], None] | None = None
        with _lock:
            if len(_abandoned) >= LIMIT:
                raise ProcessGroupError(
                    f"{name}: {len(_abandoned)} aborted configurations of this process have not ended yet"
                )
            _running.add(self)
        try:
            threading.Thread(target=self._run, name="torchft-build", daemon=True).start()
        except RuntimeError:  # no more threads
            _running.discard(self)
            raise

    def _run(self) -> None:
        try:
            self._call()
        except Exception as e:
            self.error = e
        with _lock:
            self._ended.set()
            _running.discard(self)
            _abandoned.discard(self)
            drop = self._drop
        self._over()
        if drop is not None:
            logger.debug("the abandoned configuration of %s has ended: %s", self._name, self.error or "it was made")
            self.error = None
            drop()

    def wait(self, timeout: float) -> bool:
        """Whether it has ended, after at most ``timeout`` seconds."""
        return self._ended.wait(timeout)

    def abandon(self, drop: Callable[[], None]) -> bool:
        """Leaves it alone; ``drop`` is called by its thread when it has ended.

        Returns:
            False: it has ended already, and ``drop`` is not called.
        """
        with _lock:
            if self._ended.is_set():
                return False
            self._drop = drop
            _abandoned.add(self)
            count = len(_abandoned)
        logger.debug("abandoned the configuration of %s, which does not end; there are %d such", self._name, count)
        return True


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _abandoned.clear()  # their threads are the parent's
    _running.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def end_builds(timeout: float) -> None:
    """Waits for all builds, which somebody has aborted: a thread must not come back to an interpreter that ends."""
    end = time.monotonic() + timeout
    with _lock:
        running = list(_running)
    for build in running:
        build.wait(max(0.0, end - time.monotonic()))
