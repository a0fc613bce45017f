"""One configuration of a process group: a torch group, what is pending on it, and why it ended.

Rules
    1. A session that has failed or was aborted never recovers.
    2. The first error is kept: what follows from it is not told.
    3. Errors of pending works are found when somebody looks. A work's own ``wait()`` raises at once. So a collective
       costs no callback unless somebody wants its future, and no backend thread waits for Python.
    4. Ending a session (``cut``) returns at once. Releasing it waits for its backend's threads, which the end has
       made short.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch.distributed import Work

from torchft.process_group.base import ProcessGroupError
from torchft.process_group.build import end_builds
from torchft.process_group.lost_works import GRACE, Ending
from torchft.process_group.rendezvous import Questions, RendezvousStore
from torchft.process_group.sockets import DeviceAddress, shut_down_connections
from torchft.process_group.stream_watch import StreamWatch
from torchft.runtime.deadline import Deadline
from torchft.runtime.loop import Timer, call_later

__all__ = ["STORE_GRACE", "Session", "nothing"]

logger = logging.getLogger(__name__)

STORE_GRACE = 1.0
"""Seconds beyond which an answer of the store is not late but missing."""

_RELEASE_TIMEOUT = timedelta(seconds=GRACE)
_EXIT_GRACE = 0.5  # seconds that a process that ends waits for its builds


def nothing() -> None:
    """What a session without connections has to cut."""


class Session:
    """One configuration of a group."""

    def __init__(self, name: str, alone: bool) -> None:
        self.name = name
        """For messages: who meets whom, where."""
        self.alone = alone
        """It is a group of one."""
        self.aborted = threading.Event()
        self.woken = threading.Event()
        """It was aborted, or what makes it has ended."""
        self.error: Exception | None = None
        self.group: dist.ProcessGroup | None = None
        """None: a group of one, not met yet, or released."""
        self.issue: dict[str, Callable[..., Work]] = {}
        """The group's collectives by name: the backend's own where it has one, which saves torch's dispatcher."""
        self.store: RendezvousStore | None = None
        """Kept because the backend refers to it."""
        self.cut: Callable[[], None] = nothing
        """Ends what is pending, at once; set by the backend's ``_open``, before it waits for other members."""
        self.forget: Callable[[], None] = nothing
        """Called when it is released; set by the backend's ``_open``."""
        self.watch: StreamWatch | None = None
        """Of collectives that a device carries out."""
        self.ending = Ending()
        """Of its works."""
        self.questions = Questions()
        self.abandoned = False
        """The thread that makes it releases it."""
        self._pending: deque[Work] = deque()
        self._meeting = False
        self._watchdogs: list[Timer] = []
        self._store_addresses: list[DeviceAddress] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        _living.add(self)

    def __del__(self) -> None:
        if os.getpid() == self._process:  # a forked child has a copy, and leaves its parent's connections alone
            self.cut()  # a backend that is dropped waits for its threads: they must not wait for other members
        self.forget()

    def fail(self, error: Exception) -> None:
        """Keeps the first error."""
        with self._lock:
            if self.error is None:
                self.error = error

    def track(self, work: Work) -> None:
        """Remembers a work until it is known how it ended, and forgets those of which that is known."""
        pending = self._pending
        with self._lock:
            done = []
            while pending and pending[0].is_completed():
                done.append(pending.popleft())
            pending.append(work)
        for ended in done:
            self._settle(ended)

    def look(self) -> Exception | None:
        """The error so far, counting the pending works that have completed."""
        if self.error is None and self._pending:
            with self._lock:
                done = [w for w in self._pending if w.is_completed()]
                if done:
                    self._pending = deque(w for w in self._pending if w not in done)
            for ended in done:
                self._settle(ended)
        return self.error

    @property
    def busy(self) -> bool:
        """Something has been issued that was not known to have ended when somebody last looked."""
        return bool(self._pending)

    def _settle(self, ended: Work) -> None:
        try:
            ended.wait()  # it has completed: this only raises what it failed with
        except Exception as e:
            self.fail(e)

    def abort(self, reason: str) -> None:
        self.fail(ProcessGroupError(reason))
        self.aborted.set()
        try:
            if os.getpid() == self._process:
                self.cut()
        finally:
            self.woken.set()
        if self.group is not None and self.ending.error is None:
            call_later(GRACE, partial(self.ending.give_up, str(self.error)))
        if self._meeting:
            self._watchdogs.append(call_later(STORE_GRACE, self._cut_store))

    def watch_store(self, addresses: list[DeviceAddress], timeout: float) -> None:
        """From now until :meth:`met`: ends questions to the store that take much longer than ``timeout``, or go on
        after an abort. A store that takes that long is stopped, so that other users of it lose nothing.
        """
        self._store_addresses = addresses
        self._meeting = True
        self._watchdogs.append(call_later(timeout + STORE_GRACE, self._cut_store))

    def met(self) -> None:
        """Nothing is asked of the store any more."""
        self._meeting = False
        watchdogs, self._watchdogs = self._watchdogs, []
        for timer in watchdogs:
            timer.cancel()

    def _cut_store(self) -> None:
        if self._meeting and self.questions.open:
            logger.warning("%s: the store does not answer: closing the connections to it", self.name)
            shut_down_connections((), self._store_addresses)
            self._watchdogs.append(call_later(STORE_GRACE, self._cut_store))  # torch's client connects again

    def release(self) -> None:
        """Lets go of the backend, after :meth:`abort`. Waits a moment for works that were pending; they fail at once,
        or else a thread waits for them and lets go.
        """
        deadline = Deadline(_RELEASE_TIMEOUT)
        with self._lock:
            pending, self._pending = list(self._pending), deque()
        for work in pending:
            try:
                work.wait(timedelta(seconds=max(0.001, deadline.remaining())))
            except Exception as e:
                logger.debug("a collective of %s ended with its group: %s", self.name, e)
        lost = [work for work in pending if not work.is_completed()]
        if lost:
            logger.debug("%s: %d collectives do not end before their timeout", self.name, len(lost))
            self.ending.give_up(str(self.error))
            kept = (self.group, self.issue, self.store)  # whoever drops the group waits for them
            threading.Thread(target=_outlast, args=(lost, [kept]), name="torchft-lost", daemon=True).start()
        self.group = None
        self.issue = {}
        self.cut = nothing
        self.store = None
        self.forget()
        self.forget = nothing


def _outlast(lost: list[Work], kept: list[object]) -> None:
    for work in lost:
        try:
            work.wait()
        except Exception as e:
            logger.debug("a lost collective has ended: %s", e)
    lost.clear()
    kept.clear()


def _end_all() -> None:
    for session in list(_living):
        session.abort("the process ends")
    end_builds(_EXIT_GRACE)
    for session in list(_living):
        session.cut = nothing  # nothing to do while the interpreter is taken apart


_living: weakref.WeakSet[Session] = weakref.WeakSet()
atexit.register(_end_all)
os.register_at_fork(after_in_child=_living.clear)  # they are the parent's
