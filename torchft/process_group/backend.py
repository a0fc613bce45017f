"""A torch backend that is made anew by each ``configure``.

The idea
    A :class:`Session` is one configuration: a torch process group, what is pending on it, and why it ended. The
    group of this module holds at most one session. ``configure`` ends it, makes the next, and puts it in place
    only if nobody aborted or configured meanwhile.

Rules
    1. A session that has failed or was aborted never recovers.
    2. The first error is kept: what follows from it is not told.
    3. Errors of pending works are found when somebody looks: at the next collective and in ``errored()``. A work's
       own ``wait()`` raises at once. So a collective costs no callback, and no backend thread waits for Python.
    4. A group of one has no backend and asks no store.
    5. Ending a session (``_cut``) returns at once. Releasing it waits for its backend's threads, which the end has
       made short, and is done by the next ``configure`` or by ``shutdown``.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Work

from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError
from torchft.process_group.dummy import COLLECTIVES, run_alone
from torchft.process_group.rendezvous import RendezvousStore, StoreClient, split_store_address, store_addresses
from torchft.process_group.sockets import DeviceAddress, shut_down_connections
from torchft.process_group.works import PointToPointWork
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.runtime.deadline import Deadline
from torchft.runtime.loop import Timer, call_later

__all__ = ["BackendProcessGroup", "Session", "torch_group"]

logger = logging.getLogger(__name__)

_RELEASE_TIMEOUT = timedelta(seconds=5)
_STORE_GRACE = 1.0  # seconds beyond which an answer of the store is not late but missing


class Session:
    """One configuration of a group."""

    def __init__(self, name: str, alone: bool) -> None:
        self.name = name
        """For messages: who meets whom, where."""
        self.alone = alone
        """It is a group of one."""
        self.aborted = threading.Event()
        self.error: Exception | None = None
        self.group: dist.ProcessGroup | None = None
        """None: a group of one, not met yet, or released."""
        self.issue: dict[str, Callable[..., Work]] = {}
        """The group's collectives by name: the backend's own where it has one, which saves torch's dispatcher."""
        self.store: RendezvousStore | None = None
        """Kept because the backend refers to it."""
        self.cut: Callable[[], None] = _nothing
        """Ends what is pending, at once; set by the backend's ``_open``."""
        self._pending: deque[Work] = deque()
        self._meeting = False
        self._watchdogs: list[Timer] = []
        self._store_addresses: list[DeviceAddress] = []
        self._lock = threading.Lock()
        _living.add(self)

    def __del__(self) -> None:
        self.cut()  # a backend that is dropped waits for its threads: they must not wait for other members

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

    def _settle(self, ended: Work) -> None:
        try:
            ended.wait()  # it has completed: this only raises what it failed with
        except Exception as e:
            self.fail(e)

    def abort(self, reason: str) -> None:
        self.fail(ProcessGroupError(reason))
        self.aborted.set()
        self.cut()
        if self._meeting:
            self._watchdogs.append(call_later(_STORE_GRACE, self._cut_store))

    def watch_store(self, addresses: list[DeviceAddress], timeout: float) -> None:
        """From now until :meth:`met`: ends questions to the store that take much longer than ``timeout``, or go on
        after an abort. A store that takes that long is stopped, so that other users of it lose nothing.
        """
        self._store_addresses = addresses
        self._meeting = True
        self._watchdogs.append(call_later(timeout + _STORE_GRACE, self._cut_store))

    def met(self) -> None:
        """Nothing is asked of the store any more."""
        self._meeting = False
        watchdogs, self._watchdogs = self._watchdogs, []
        for timer in watchdogs:
            timer.cancel()

    def _cut_store(self) -> None:
        if self._meeting:
            logger.warning("%s: the store does not answer: closing the connections to it", self.name)
            shut_down_connections((), self._store_addresses)

    def release(self) -> None:
        """Lets go of the backend, after :meth:`abort`. Waits for works that were pending; they fail at once."""
        deadline = Deadline(_RELEASE_TIMEOUT)
        with self._lock:
            pending, self._pending = list(self._pending), deque()
        for work in pending:
            try:
                work.wait(timedelta(seconds=max(0.001, deadline.remaining())))
            except Exception as e:
                logger.debug("a collective of %s ended with its group: %s", self.name, e)
        self.group = None
        self.issue = {}
        self.cut = _nothing
        self.store = None


def _collectives(group: dist.ProcessGroup) -> dict[str, Callable[..., Work]]:
    backend = group._get_backend(group._device_types[0])
    return {op: getattr(backend, op, None) or getattr(group, op) for op in COLLECTIVES}


def torch_group(backend: Any, kind: Any, device: str, rank: int, world_size: int) -> dist.ProcessGroup:
    """A torch process group with ``backend`` for tensors on ``device`` and for everything without a tensor."""
    group = dist.ProcessGroup(rank, world_size)  # type: ignore[call-arg]  # the stub wants a store
    group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    return group


def _end_all() -> None:
    for session in list(_living):
        session.abort("the process ends")
        session.cut = _nothing  # nothing to do while the interpreter is taken apart


_living: weakref.WeakSet[Session] = weakref.WeakSet()
atexit.register(_end_all)


def _nothing() -> None:
    """What a session without connections has to cut."""


class BackendProcessGroup(ProcessGroupWrapper):
    """The state machine of the module's docstring. A subclass names its backend in :meth:`_open`.

    Args:
        timeout: the longest wait of a configuration and of each collective.
    """

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        super().__init__()
        self._timeout = timeout
        self._session: Session | None = None
        self._attempt: Session | None = None  # the session being made, or the one in place
        self._failure: Exception | None = None  # of the last configure
        self._state = threading.Lock()  # guards the four above; never held while waiting
        self._configuring = threading.Lock()  # one configure at a time; guards the store client
        self._store_client = StoreClient()
        self._ended: list[Session] = []  # to be released

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        """Meets the other members under ``session.store`` and sets ``session.cut``.

        Raises:
            Exception: they did not come within ``timeout``.
        """
        raise self._unsupported("_open")

    # ---------------------------------------------------------------------------------------------- life

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} members makes no sense")
        split_store_address(store_addr)
        quorum = "" if quorum_id is None else f", quorum {quorum_id}"
        session = Session(f"rank {rank} of {world_size} ({replica_id}{quorum}) at {store_addr}", world_size == 1)
        deadline = Deadline(self._timeout)
        self._replace(session, f"the process group was configured anew by {replica_id}{quorum}")
        if not self._configuring.acquire(timeout=deadline.remaining()):
            raise ProcessGroupError(f"{session.name}: an earlier configure did not end in {deadline.timeout:g} s")
        try:
            self._release_ended()
            if world_size > 1 and not session.aborted.is_set():
                session.watch_store(store_addresses(store_addr), deadline.remaining())
                session.store = self._store_client.store(
                    store_addr, timedelta(seconds=deadline.remaining()), session.aborted
                )
                remaining = timedelta(seconds=max(0.001, deadline.remaining()))
                session.group = self._open(session, rank, world_size, remaining, global_ranks)
                session.group.set_timeout(self._timeout)
                session.issue = _collectives(session.group)
                session.store.lift_deadline()
        except Exception as e:
            self._give_up(session, e)
            raise
        finally:
            session.met()
            self._configuring.release()
        with self._state:
            installed = self._attempt is session and not session.aborted.is_set()
            if installed:
                self._session, self._rank, self._world_size = session, rank, world_size
        if not installed:
            error = ProcessGroupError(f"aborted while it was configured: {session.name}")
            self._give_up(session, error)
            raise error

    def _replace(self, session: Session | None, reason: str) -> None:
        """Ends the session in place or being made; ``session`` is the one being made from now on."""
        with self._state:
            former, self._attempt, self._session = self._attempt, session, None
            self._failure = None
            if former is not None:
                self._ended.append(former)
        if former is not None:
            former.abort(reason)

    def _give_up(self, session: Session, error: Exception) -> None:
        session.abort(str(error))
        session.release()
        with self._state:
            if self._attempt is session:
                self._attempt, self._failure = None, error

    def _release_ended(self) -> None:
        with self._state:
            ended, self._ended = self._ended, []
        for session in ended:
            session.release()

    def abort(self) -> None:
        with self._state:
            session = self._attempt
        if session is not None:
            session.abort(f"the process group was aborted: {session.name}")

    def errored(self) -> Exception | None:
        with self._state:
            session, failure = self._session, self._failure
        return failure if session is None else session.look()

    def shutdown(self) -> None:
        self._replace(None, "the process group was shut down")
        with self._configuring:
            self._release_ended()
            self._store_client.close()

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        session = self._session
        if session is not None and session.group is not None:
            session.group.set_timeout(timeout)

    # ---------------------------------------------------------------------------------------- collectives

    def _run(self, op: str, args: tuple[Any, ...], result: Any) -> Work:
        session = self._session
        if session is None or session.error is not None:
            raise self._refusal(op, session)
        if session.alone:
            return run_alone(op, args, result)
        issue = session.issue.get(op)
        if issue is None:  # another thread ended the session just now
            raise self._refusal(op, session)
        try:
            work = issue(*args)
        except Exception as e:
            session.fail(e)
            raise
        if op == "send" or op == "recv":
            return PointToPointWork(work, args[0], session.fail)
        session.track(work)
        return work

    def _refusal(self, op: str, session: Session | None) -> Exception:
        if session is None:
            why = f": {self._failure}" if self._failure is not None else ""
            return ProcessGroupError(f"{op}: the process group is not configured{why}")
        error = ProcessGroupError(
            f"{op}: the process group cannot be used until it is configured again: {session.error}"
        )
        error.__cause__ = session.error
        return error
