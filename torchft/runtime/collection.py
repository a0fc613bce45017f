"""Python's search for garbage, put off while many objects are made that all stay.

Each few hundred new objects Python looks for cycles among the young ones, and now and then among all: with torch
loaded that takes from tens of milliseconds up, in the thread that happens to make the object. Where it is known that
nothing becomes garbage, it is in vain.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collection_put_off"]

_lock = threading.Lock()
_inside = 0
_was_enabled = False


@contextmanager
def collection_put_off() -> Iterator[None]:
    """Inside, no cycles are looked for, in any thread. For work that is bounded; also a decorator.

    Several threads may be inside; when the last one has left, it is as it was before the first.
    """
    global _inside, _was_enabled
    with _lock:
        if not _inside:
            _was_enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_enabled:
                gc.enable()


def _only_this_thread() -> None:
    """A forked child has no other thread, and nobody who leaves."""
    global _lock, _inside
    _lock = threading.Lock()
    if _inside and _was_enabled:
        gc.enable()
    _inside = 0


os.register_at_fork(after_in_child=_only_this_thread)
