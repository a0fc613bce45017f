"""Waiting for a condition that nothing announces, without guessing how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from torchft.runtime.deadline import Deadline

__all__ = ["wait_until"]


def wait_until(condition: Callable[[], object], timeout: float = 30.0, what: str = "the condition") -> None:
    """Returns when ``condition()`` is true; looks every millisecond.

    Raises:
        TimeoutError: it was not true within ``timeout`` seconds; the message names ``what``.
    """
    deadline = Deadline(timeout)
    while not condition():
        if deadline.expired:
            raise TimeoutError(f"{what} did not come true within {timeout:g} s")
        time.sleep(0.001)
