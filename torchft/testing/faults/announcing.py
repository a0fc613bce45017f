"""Every act is said before it is done: one log line with kind, victim and step, flushed.

A fault may end the process at once, so the line has to be out of the process before the fault begins. The level is
WARNING: without any logging set up, Python prints that to standard error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["announce", "at_step"]

_logger = logging.getLogger("torchft.testing.faults")
_step: ContextVar[int | None] = ContextVar("torchft_fault_step", default=None)


@contextmanager
def at_step(step: int | None) -> Iterator[None]:
    """What is announced inside by this thread happens at ``step``; None: no step is known."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def announce(kind: str, victim: str, detail: str = "") -> None:
    """Logs one act that is about to happen, and flushes the handlers that got the line.

    Args:
        kind: of the fault: ``kill``, ``stop``, and so on.
        victim: a process, a link or a path, as people call it.
        detail: duration, rate, message.
    """
    step = _step.get()
    _logger.warning(
        "fault %s, victim %s, step %s%s", kind, victim, "-" if step is None else step, f": {detail}" if detail else ""
    )
    place: logging.Logger | None = _logger
    while place is not None:
        for handler in place.handlers:
            handler.flush()
        place = place.parent if place.propagate else None
