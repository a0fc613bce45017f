"""Faults that are done to other processes, from outside, at random times."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from torchft.testing.faults.link import Link
from torchft.testing.faults.performing import Act, Performer
from torchft.testing.faults.plan import Fault, Plan, Schedule

__all__ = ["Chaos"]

_logger = logging.getLogger("torchft.testing.faults")


class Chaos:
    """Hits processes and links as the plan says. A context manager: entering starts it, leaving stops it.

    Faults with a rate in seconds come from a thread of its own. Those at a step need somebody who knows the step and
    calls :meth:`on_step`.

    Which victim is hit is drawn from the seed too, by position in the sorted names: give names that are the same in
    each run, if the same seed is to hit the same ones.

    Args:
        plan: or its text, as of :meth:`Plan.parse`. Of the faults of a process ``kill``, ``stop`` and ``continue``.
        pids: asked before each act for the processes that live now: ids by name, or just ids.
        links: that the network faults of the plan are done to.
        name: a part of the seed.

    Raises:
        ValueError: the plan is not one, or has a fault that is not possible here.
    """

    def __init__(
        self,
        plan: Plan | str,
        pids: Callable[[], Mapping[str, int] | Iterable[int]] = dict,
        *,
        links: Iterable[Link] = (),
        name: str = "",
    ) -> None:
        self.plan = Plan.parse(plan) if isinstance(plan, str) else plan
        self._pids = pids
        self._schedule = Schedule(self.plan, name)
        self._performer = Performer(self.plan, False, links)
        self._lock = threading.Lock()  # one act at a time: of the thread, or of on_step
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def acts(self) -> list[Act]:
        """What was done so far, in order."""
        return list(self._performer.acts)

    def start(self) -> Chaos:
        """Begins; times count from now.

        Raises:
            RuntimeError: it was started before.
        """
        if self._thread is not None:
            raise RuntimeError("chaos starts once: make another one")
        self._performer.elapsed()
        self._thread = threading.Thread(target=self._run, name="torchft-chaos", daemon=True)
        self._thread.start()
        return self

    def on_step(self, step: int) -> None:
        """Does what is due as ``step`` begins, in the thread that calls. An act that fails is logged."""
        with self._lock:
            self._perform(self._schedule.due_in(step), step)

    def stop(self) -> None:
        """Ends it: no act after this, what it has stopped is continued, links and disks are restored. Idempotent."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()  # an act takes a bounded time
        with self._lock:
            self._performer.release()

    def __enter__(self) -> Chaos:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while (due := self._schedule.next_time()) is not None:
            if self._end.wait(max(0.0, due - self._performer.elapsed())):
                return
            with self._lock:
                self._perform(self._schedule.due_at(self._performer.elapsed()), None)

    def _perform(self, due: list[tuple[Fault, random.Random]], step: int | None) -> None:
        for fault, rng in due:
            if self._end.is_set():
                return
            try:
                given = self._pids()
                named = given if isinstance(given, Mapping) else {str(pid): pid for pid in given}
                self._performer.perform(fault, rng, step, dict(named))
            except ProcessLookupError:
                _logger.info("fault %s: the victim was gone", fault)
            except Exception:
                _logger.exception("fault %s could not be done", fault)
