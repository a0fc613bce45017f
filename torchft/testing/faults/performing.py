"""Doing what a plan says: who is hit, whether it may still happen, and what lasts of it.

Shared by :class:`Injector` (in the process that is hit) and :class:`Chaos` (outside).
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.testing.faults.announcing import at_step
from torchft.testing.faults.disk import fill_disk, limit_file_size
from torchft.testing.faults.effect import Effect
from torchft.testing.faults.kinds import KINDS
from torchft.testing.faults.link import Link
from torchft.testing.faults.load import busy
from torchft.testing.faults.plan import Fault, Plan
from torchft.testing.faults.process import continue_, exit_, hold_gil, kill, raise_, segfault, stop

__all__ = ["Act", "Performer"]

_logger = logging.getLogger("torchft.testing.faults")


@dataclass(frozen=True)
class Act:
    """Something that was done.

    Attributes:
        seconds: since the first step or the start.
        kind: of fault.
        victim: name of the process or link; a path; or ``this machine``.
        step: where one is known.
    """

    seconds: float
    kind: str
    victim: str
    step: int | None


class Performer:
    """Performs faults, remembers the acts, and ends what lasts of them.

    Args:
        plan: checked: all its kinds must be possible here.
        inside: whether the process that has this one is the victim.
        links: that network faults are done to.

    Raises:
        ValueError: the plan has a fault that is not possible here.
    """

    def __init__(self, plan: Plan, inside: bool, links: Iterable[Link]) -> None:
        self.acts: list[Act] = []
        self._began: float | None = None
        self._links = {link.name: link for link in links}
        self._effects: list[Effect] = []
        self._stopped: dict[int, Effect] = {}
        self._newest: dict[tuple[str, str], object] = {}
        for fault in plan.faults:
            of = KINDS[fault.kind].of
            if of == "link" and not self._links:
                raise ValueError(f"{str(fault)!r} is done to a link, and none was given (links=)")
            if of == "other" and inside:
                raise ValueError(f"{str(fault)!r} cannot be done by a process to itself: use Chaos")
            if of == "self" and not inside:
                raise ValueError(f"{str(fault)!r} can only be done by a process to itself: use Injector in it")

    def elapsed(self) -> float:
        """Seconds since this was called first."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        return now - self._began

    def perform(self, fault: Fault, rng: random.Random, step: int | None, processes: Mapping[str, int | None]) -> None:
        """Draws a victim and does it. Nothing happens where there is no victim, or the fault's ``once`` is used up.

        Args:
            fault: to perform.
            rng: draws the victim.
            step: for the log.
            processes: by name; None stands for this process.

        Raises:
            BaseException: what the fault raises, or why it could not be done.
        """
        draw = rng.random()  # always, so that the next victims do not depend on who is there now
        of = KINDS[fault.kind].of
        if of == "machine":
            names = [str(fault.options.get("path", "this machine"))]
        elif of == "link":
            names = [name for name in self._links if fault.is_for(name)]
        else:
            names = [
                name for name, pid in processes.items() if fault.is_for(name) and self._can_be_hit(fault.kind, pid)
            ]
        if not names:
            _logger.info("fault %s at step %s has no victim", fault, step)
            return
        victim = sorted(names)[int(draw * len(names))]
        if fault.once is not None and not _claim(fault.once):
            _logger.info("fault %s has happened before", fault)
            return
        self._effects = [e for e in self._effects if e.active]
        self.acts.append(Act(self.elapsed(), fault.kind, victim, step))
        with at_step(step):
            if of == "link":
                self._do_to_link(self._links[victim], fault.kind, fault.options)
            else:
                self._do(fault.kind, fault.options, processes.get(victim))

    def release(self) -> None:
        """Ends what lasts: continues what is stopped, restores links and disks."""
        effects, self._effects = self._effects, []
        for effect in [*effects, *self._stopped.values()]:
            try:
                effect.release()
            except Exception:
                _logger.exception("an effect could not be ended")
        self._stopped.clear()

    def _can_be_hit(self, kind: str, pid: int | None) -> bool:
        standing = pid is not None and pid in self._stopped and self._stopped[pid].active
        return {"stop": not standing, "continue": standing}.get(kind, True)

    def _do(self, kind: str, options: Mapping[str, Any], pid: int | None) -> None:
        match kind:
            case "kill":
                kill(pid)
            case "stop":
                effect = stop(pid, options.get("seconds"))
                if pid is not None:
                    self._stopped[pid] = effect
            case "continue":
                assert pid is not None  # of "other": never this process
                continue_(pid)
                self._stopped.pop(pid).release()
            case "raise":
                raise_(**options)
            case "exit":
                exit_(**options)
            case "segfault":
                segfault()
            case "hold_gil":
                hold_gil(**options)
            case "busy":
                self._effects.append(busy(**options))
            case "fill_disk":
                self._effects.append(fill_disk(**options))
            case "limit_file_size":
                self._effects.append(limit_file_size(**options))
            case _:
                raise AssertionError(f"nobody does {kind}")

    def _do_to_link(self, link: Link, kind: str, options: Mapping[str, Any]) -> None:
        undo: Callable[[], None]
        match kind:
            case "cut":
                link.cut()
                return
            case "block":
                link.block()
                undo = link.unblock
            case "refuse":
                link.refuse()
                undo = link.accept
            case "delay":
                link.delay(options["by"])
                undo = _with(link.delay, 0.0)
            case "throttle":
                link.throttle(options["rate"])
                undo = _with(link.throttle, None)
            case _:
                raise AssertionError(f"nobody does {kind}")
        key, mine = (link.name, kind), object()
        self._newest[key] = mine

        def end() -> None:
            # The same again in the meantime lasts for its own time.
            if self._newest.get(key) is mine and not link.closed:
                undo()

        self._effects.append(Effect(f"{kind} of {link.name}", end, options.get("seconds")))


def _with(call: Callable[[Any], None], value: object) -> Callable[[], None]:
    return lambda: call(value)


def _claim(marker: str) -> bool:
    """Creates the file; False if it is there. Of many processes only one is told True."""
    path = Path(marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    return True
