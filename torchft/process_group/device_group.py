"""Groups whose backend works on an accelerator's streams: what NCCL's and XCCL's have in common.

Rules
    1. Issuing a collective records an event and returns; nobody waits for the device on the training thread.
    2. Timeouts follow the stream (:mod:`torchft.process_group.stream_watch`). The backend's own watchdog would end the
       process, so it is given a timeout that never comes.
    3. What runs too long or fails ends the session: the flight recorder is written, the communicators are torn down on
       a thread of their own (that may take long), and everything pending fails.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed import Work

from torchft import config
from torchft.process_group.backend import BackendProcessGroup
from torchft.process_group.base import ProcessGroupError
from torchft.process_group.flight_recorder import dump
from torchft.process_group.session import Session
from torchft.process_group.stream_watch import Completes, StreamWatch
from torchft.runtime.deadline import seconds

__all__ = ["NEVER", "DeviceProcessGroup", "Teardown", "check_hardware", "outcome"]

logger = logging.getLogger(__name__)

NEVER = timedelta(days=1000)
"""The backend's own timeout."""


class DeviceProcessGroup(BackendProcessGroup):
    """See the module. A subclass opens the backend, and calls :meth:`_watch_device` as soon as it is there."""

    _module: ClassVar[Any]
    """``torch.cuda`` or ``torch.xpu``."""

    def _enter_thread(self) -> Callable[[], None]:
        return partial(self._module.set_device, self._module.current_device())  # each thread has its own

    def _mark(self) -> Completes:
        """An event at the current end of the current stream."""
        event: Completes = self._module.current_stream().record_event()
        return event

    def _watch_device(self, session: Session, tear_down: Callable[[], None]) -> None:
        """From now on an abort of the session tears the backend down, and its collectives are watched.

        Args:
            tear_down: the backend's abort, which may take as long as it likes.
        """
        session.cut = Teardown(session, tear_down)
        session.watch = StreamWatch(partial(_expired, weakref.ref(session)))
        session.forget = session.watch.stop

    def _watched(self, session: Session, op: str, args: tuple[Any, ...], work: Work, reached: Any) -> Work:
        if session.watch is not None:
            asked = getattr(args[-1], "timeout", NEVER)
            timeout = asked if isinstance(asked, timedelta) and timedelta(0) < asked < NEVER else self._timeout
            session.watch.watch(f"{op} of {session.name}", reached, partial(outcome, work), seconds(timeout))
        return super()._watched(session, op, args, work, reached)

    def _bound(self, group: dist.ProcessGroup) -> None:
        """Nothing: see the rules."""


class Teardown:
    """Ends a backend, once, on a thread of its own. What is called when a session is cut.

    Args:
        session: that it is of; the flight recorder is written when something is pending there.
        tear_down: the backend's abort.
    """

    def __init__(self, session: Session, tear_down: Callable[[], None]) -> None:
        self._session = weakref.ref(session)
        self._name = session.name
        self._tear_down = tear_down
        self._lock = threading.Lock()
        self._begun = False

    def __call__(self) -> None:
        with self._lock:
            if self._begun:
                return
            self._begun = True
        session = self._session()
        busy = session is not None and session.busy
        if session is not None and session.watch is not None:
            session.watch.stop()
        threading.Thread(target=self._run, args=(busy,), name="torchft-teardown", daemon=True).start()

    def _run(self, busy: bool) -> None:
        if busy:
            dump(self._name, config.RANK.read())
        try:
            self._tear_down()
        except Exception as e:
            logger.warning("%s: tearing the backend down failed: %s", self._name, e)


def check_hardware(name: str, library: str, built: bool, device: str, there: bool) -> None:
    """Says what a group is missing.

    Args:
        name: of the group's class.
        library: that carries its collectives.
        built: whether this torch has it.
        device: what it works on, with its article.
        there: whether torch finds one.

    Raises:
        ProcessGroupError: something is missing.
    """
    if not built:
        raise ProcessGroupError(f"{name} needs a torch built with {library}; this one has none")
    if not there:
        raise ProcessGroupError(f"{name} needs {device} device; torch finds none")


def outcome(work: Work) -> bool:
    """Whether the device has done it.

    Raises:
        Exception: what the backend found that it failed with.
    """
    if not work.is_completed():
        return False
    try:
        error = work.exception()
    except (RuntimeError, TypeError):
        return True  # this backend's works have none to tell
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise ProcessGroupError(str(error))
    return True


def _expired(session: weakref.ref[Session], error: Exception) -> None:
    ended = session()
    if ended is not None:
        ended.fail(error)
        ended.abort(str(error))
