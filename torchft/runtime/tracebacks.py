"""Exceptions that are kept: without the frames that they came from.

An exception's traceback holds all locals of the frames that it passed, and of their callers. What is kept by one of
these makes a cycle: sockets, threads and whole states would stay until the cycle collector runs, which many a training
loop calls seldom.
"""

from __future__ import annotations

import copy
from typing import TypeVar

__all__ = ["anew", "without_frames"]

E = TypeVar("E", bound=BaseException)


def without_frames(error: E, contexts: bool = False) -> E:
    """The same exception, which has no traceback any more; nor have those that it was raised from.

    Args:
        error: to be kept.
        contexts: also those that were being handled meanwhile (``__context__``): where none of them is a caller's, as
            on a thread of one's own.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [one.__cause__, one.__context__ if contexts else None]
    return error


def anew(error: E) -> E:
    """An exception like one that is kept, to be raised in its place: that one gets no frames. The same if it cannot be
    copied.
    """
    try:
        copied = copy.copy(error)
    except Exception:
        return error
    if type(copied) is not type(error) or copied.args != error.args:
        return error
    copied.__cause__ = error.__cause__
    return copied
