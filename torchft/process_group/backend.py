"""A torch backend that is made anew by each ``configure``.

The idea
    A :class:`~torchft.process_group.session.Session` is one configuration. The group of this module holds at most
    one. ``configure`` ends it, makes the next, and puts it in place only if nobody aborted or configured meanwhile.

Rules
    1. Errors of pending works are found when somebody looks: at the next collective and in ``errored()``.
    2. A group of one has no backend and asks no store.
    3. A session is made on a thread of its own (:mod:`torchft.process_group.build`). ``configure`` waits for that,
       but not after an abort, nor long after the timeout: then the thread is left to end by itself.
    4. A session is released by the next ``configure`` or by ``shutdown``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import Work

from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroupError
from torchft.process_group.build import Build
from torchft.process_group.dummy import COLLECTIVES, run_alone
from torchft.process_group.lost_works import LosableCollective, LosablePointToPoint
from torchft.process_group.rendezvous import (
    StoreClient,
    split_store_address,
    store_addresses,
)
from torchft.process_group.session import STORE_GRACE, Session, nothing
from torchft.process_group.works import PointToPointWork
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.runtime.deadline import LONGEST, Deadline

__all__ = ["BackendProcessGroup", "Membership", "torch_group"]

_BUILD_GRACE = 0.02  # seconds in which a build usually ends once it is cut
_LATE = 2 * STORE_GRACE  # seconds beyond the timeout after which a build is not waited for


def _collectives(group: dist.ProcessGroup) -> dict[str, Callable[..., Work]]:
    backend = group._get_backend(group._device_types[0])
    return {op: getattr(backend, op, None) or getattr(group, op) for op in COLLECTIVES}


def torch_group(backend: Any, kind: Any, device: str, rank: int, world_size: int) -> dist.ProcessGroup:
    """A torch process group with ``backend`` for tensors on ``device`` and for everything without a tensor."""
    group = dist.ProcessGroup(rank, world_size)  # type: ignore[call-arg]  # the stub wants a store
    group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    return group


@dataclass(frozen=True)
class Membership:
    """What ``configure`` was called with, as far as it is used."""

    store_addr: str
    replica_id: str
    rank: int
    world_size: int
    quorum_id: int | None
    global_ranks: list[int] | None


class BackendProcessGroup(ProcessGroupWrapper):
    """The state machine of the module's docstring. A subclass names its backend in :meth:`_open`.

    Args:
        timeout: the longest wait of a configuration and of each collective; cut to ten years.
    """

    _loses_works: ClassVar[bool] = False
    """A work of the backend may not end when the session is cut. Of works that the host waits for only."""

    def __init__(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        super().__init__()
        self._timeout = min(timeout, LONGEST)
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
        """Meets the other members under ``session.store`` and sets ``session.cut``. Runs on a thread of its own.

        Raises:
            Exception: they did not come within ``timeout``.
        """
        raise self._unsupported("_open")

    def _enter_thread(self) -> Callable[[], None]:
        """Asked by the thread that configures; the answer is called by the one on which ``_open`` runs."""
        return nothing

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
        member = Membership(store_addr, replica_id, rank, world_size, quorum_id, global_ranks)
        quorum = "" if quorum_id is None else f", quorum {quorum_id}"
        session = Session(f"rank {rank} of {world_size} ({replica_id}{quorum}) at {store_addr}", world_size == 1)
        deadline = Deadline(self._timeout)
        self._replace(session, f"the process group was configured anew by {replica_id}{quorum}")
        if not self._configuring.acquire(timeout=deadline.remaining()):
            raise ProcessGroupError(f"{session.name}: an earlier configure did not end in {deadline.timeout:g} s")
        try:
            self._release_ended()
            if world_size > 1 and not session.aborted.is_set():
                self._build(session, member, deadline)
        except BaseException as e:
            self._give_up(session, e if isinstance(e, Exception) else ProcessGroupError(f"interrupted: {e!r}"))
            raise
        finally:
            self._configuring.release()
        with self._state:
            installed = self._attempt is session and not session.aborted.is_set()
            if installed:
                self._session, self._rank, self._world_size = session, rank, world_size
        if not installed:
            error = self._unfinished(session, deadline)
            self._give_up(session, error)
            raise error

    def _build(self, session: Session, member: Membership, deadline: Deadline) -> None:
        """Makes the session's group on another thread; walks away from it when it does not end."""
        client = self._store_client
        enter = self._enter_thread()

        def make() -> None:
            try:
                enter()
                session.watch_store(store_addresses(member.store_addr), deadline.remaining())
                if session.aborted.is_set():
                    raise self._unfinished(session, deadline)
                with session.questions:
                    store = client.store(member.store_addr, deadline, session.aborted)
                store.questions = session.questions
                session.store = store
                remaining = timedelta(seconds=max(0.001, deadline.remaining()))
                group = self._open(session, member.rank, member.world_size, remaining, member.global_ranks)
                self._bound(group)
                session.issue = _collectives(group)
                session.group = group
                with session.questions:
                    client.tidy()
                store.lift_deadline()
            finally:
                session.met()

        def drop() -> None:
            session.cut()
            session.release()
            client.close()

        build = Build(make, session.woken.set, session.name)
        try:
            session.woken.wait(deadline.remaining() + _LATE)
            ended = build.wait(_BUILD_GRACE)
        except BaseException:  # KeyboardInterrupt
            ended = False
            raise
        finally:
            if not ended and build.abandon(drop):
                self._store_client = StoreClient()
                session.abandoned = True
        if session.abandoned or (build.error is not None and session.aborted.is_set()):
            raise self._unfinished(session, deadline) from build.error
        if build.error is not None:
            raise build.error

    def _unfinished(self, session: Session, deadline: Deadline) -> ProcessGroupError:
        if session.aborted.is_set():
            return ProcessGroupError(f"aborted while it was configured: {session.name}")
        return ProcessGroupError(f"{session.name}: the members did not meet within {deadline.timeout:g} s")

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
        if not session.abandoned:  # or else its thread does it
            session.release()
        with self._state:
            if self._attempt is session:
                self._attempt, self._failure = None, error

    def _release_ended(self) -> None:
        with self._state:
            ended, self._ended = self._ended, []
        for session in ended:
            if not session.abandoned:
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
        self._timeout = min(timeout, LONGEST)
        session = self._session
        if session is not None and session.group is not None:
            self._bound(session.group)

    def _bound(self, group: dist.ProcessGroup) -> None:
        """The backend's collectives take no longer than the timeout from now on."""
        group.set_timeout(self._timeout)

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
        reached = self._mark()
        try:
            work = issue(*args)
        except Exception as e:
            session.fail(e)
            raise
        return self._watched(session, op, args, work, reached)

    def _mark(self) -> Any:
        """Called before a collective is issued; for :meth:`_watched`."""
        return None

    def _watched(self, session: Session, op: str, args: tuple[Any, ...], work: Work, reached: Any) -> Work:
        """The work that the caller gets, in place of the backend's; the session learns how that ends."""
        if op == "send" or op == "recv":
            if self._loses_works:
                return LosablePointToPoint(work, args[0], session.fail, session.ending)
            return PointToPointWork(work, args[0], session.fail)
        session.track(work)
        return LosableCollective(work, session.ending) if self._loses_works else work

    def _refusal(self, op: str, session: Session | None) -> Exception:
        if session is None:
            why = f": {self._failure}" if self._failure is not None else ""
            return ProcessGroupError(f"{op}: the process group is not configured{why}")
        error = ProcessGroupError(
            f"{op}: the process group cannot be used until it is configured again: {session.error}"
        )
        error.__cause__ = session.error
        return error
