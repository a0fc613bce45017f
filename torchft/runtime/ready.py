"""Waiting until there is something to read, whatever number the descriptor has.

``select.select`` refuses descriptors from 1024 on, and a trainer that gives its state to hundreds of groups has more.
"""

from __future__ import annotations

import math
import select
from typing import Protocol

__all__ = ["readable"]

_LONGEST = (1 << 31) - 1


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def readable(what: int | _HasFileno, timeout: float | None) -> bool:
    """Whether there is something to read, or the other end is gone.

    Args:
        what: a descriptor, or what has one.
        timeout: seconds, 24 days at most; None: as long as it takes.
    """
    poll = select.poll()
    poll.register(what, select.POLLIN)
    return bool(poll.poll(None if timeout is None else math.ceil(min(1000 * max(0.0, timeout), _LONGEST))))
