"""How a trainer that ends says so, whatever ends it.

The idea
    Others learn at once that a process has died, but not why, and a death in mid-step costs them that step. So
    every way out of a trainer that Python sees becomes a leave with its reason: an exception that nobody caught, the
    end of the program without ``shutdown()``, and, where draining is on, SIGTERM: the step under way is finished,
    the group leaves between two steps, and the process exits with code 0.

Rules
    - What was installed before (an exception hook, a signal handler) is called as well.
    - A second SIGTERM does what SIGTERM did before.
"""

from __future__ import annotations

import atexit
import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol

__all__ = ["Drained", "Leaver", "drain_requested", "forget", "leave_at_the_end", "listen_for_sigterm"]

logger = logging.getLogger(__name__)


class Drained(SystemExit):
    """Ends a trainer that was asked to drain, with exit code 0. Raised between two steps."""

    def __init__(self, reason: str) -> None:
        super().__init__(0)
        self.reason = reason


class Leaver(Protocol):
    """Who leaves: a Manager."""

    def leave(self, reason: str) -> bool: ...


_lock = threading.Lock()
_leavers: set[Leaver] = set()
_installed = False
_drain = threading.Event()
_former_sigterm: object = None


def leave_at_the_end(leaver: Leaver) -> None:
    """From now on ``leaver`` leaves when the program ends, with the reason, unless :func:`forget` is called."""
    global _installed
    with _lock:
        _leavers.add(leaver)
        if _installed:
            return
        _installed = True
        former = sys.excepthook

        def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
            _all_leave(f"{kind.__name__}: {value}" if str(value) else kind.__name__)
            former(kind, value, trace)

        sys.excepthook = hook
        atexit.register(_all_leave, "the program ended without manager.shutdown()")


def forget(leaver: Leaver) -> None:
    """It has left."""
    with _lock:
        _leavers.discard(leaver)


def _all_leave(reason: str) -> None:
    for leaver in list(_leavers):
        try:
            leaver.leave(reason)
        except Exception:
            logger.exception("could not say that this group leaves")


def listen_for_sigterm() -> Callable[[], None]:
    """From now on the first SIGTERM only asks to drain.

    Returns:
        What undoes it, on the same thread. It changes nothing where SIGTERM was listened to before. That SIGTERM has
        come stays known.

    Raises:
        ValueError: this is not the main thread: only there a signal handler can be set.
    """
    global _former_sigterm
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        return lambda: None
    try:
        _former_sigterm = signal.signal(signal.SIGTERM, _on_sigterm)
    except ValueError as e:
        raise ValueError("drain=True needs the Manager to be made on the main thread: it handles SIGTERM") from e
    return _listen_no_more


def drain_requested() -> bool:
    """Whether SIGTERM has come."""
    return _drain.is_set()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if not _drain.is_set():
        _drain.set()
        logger.warning("SIGTERM: this group finishes its step and leaves; a second SIGTERM ends it at once")
        return
    _restore_sigterm()
    signal.raise_signal(signal.SIGTERM)


def _listen_no_more() -> None:
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:  # or else somebody's handler is in its place by now
        _restore_sigterm()


def _restore_sigterm() -> None:
    former = _former_sigterm if callable(_former_sigterm) or _former_sigterm == signal.SIG_IGN else signal.SIG_DFL
    signal.signal(signal.SIGTERM, former)  # type: ignore[arg-type]  # it came from signal.signal
