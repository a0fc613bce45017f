"""The threads of one fetch: begun for a source, ended with the fetch.

Rules
    - What a thread fails with ends its source; a mistake of ours ends the fetch (``failure``).
    - When :meth:`FetchThreads.join` has returned, no thread writes the receiver's memory. Others may be left, for a
      moment, in what cannot be ended (a host's name that is being looked up); they find the fetch over.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.transport import CheckpointError
from torchft.runtime.deadline import Deadline

__all__ = ["FetchThreads"]

_END = 10.0
_BRIEF = 1.0


class FetchThreads:
    """Of one fetch.

    Args:
        changed: the fetch's condition; notified when a thread has ended.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.changed = changed
        self.over = False
        """The fetch has its result, or its error."""
        self._running: set[threading.Thread] = set()
        self._writing: set[threading.Thread] = set()
        self.failure: Exception | None = None
        """What ends the fetch."""

    @property
    def writing(self) -> bool:
        """Some thread may write the receiver's memory."""
        return bool(self._writing)

    def start(self, kind: str, call: Callable[[HTTPSource], None], source: HTTPSource, writes: bool = False) -> None:
        """Begins a thread. The condition is held.

        Args:
            kind: what it does, for its name.
            call: that.
            source: with whom.
            writes: the memory that is received into.
        """
        context = contextvars.copy_context()  # the threads' log lines are said by whoever called
        thread = threading.Thread(
            target=context.run, args=(self._guard, call, source), name=f"torchft-http-{kind}", daemon=True
        )
        self._running.add(thread)
        if writes:
            self._writing.add(thread)
        thread.start()

    def join(self) -> None:
        """Waits for all, whose connections were cut.

        Raises:
            CheckpointError: one that writes did not end.
        """
        with self.changed:
            running, writing = list(self._running), list(self._writing)
        limit = Deadline(_END)
        for thread in writing:
            thread.join(limit.remaining())
        if any(t.is_alive() for t in writing):
            raise CheckpointError(f"a connection to a source could not be ended within {_END:g}s")
        limit = Deadline(_BRIEF)
        for thread in running:
            thread.join(limit.remaining())

    def _guard(self, call: Callable[[HTTPSource], None], source: HTTPSource) -> None:
        try:
            call(source)
        except CheckpointError as e:
            with self.changed:
                source.end(e)
        except Exception as e:  # a mistake of ours must end the fetch, not hang it
            with self.changed:
                self.failure = self.failure or e
        finally:
            with self.changed:
                self._running.discard(threading.current_thread())
                self._writing.discard(threading.current_thread())
                self.changed.notify_all()
