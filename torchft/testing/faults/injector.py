"""Faults that a training process does to itself, as its steps begin."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torchft import config
from torchft.testing.faults.link import Link
from torchft.testing.faults.performing import Act, Performer
from torchft.testing.faults.plan import Plan, Schedule

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["Injector"]


class Injector:
    """Does to this process what the plan says. A context manager; leaving it ends what lasts.

    One line in the loop: :meth:`on_step` as each step begins, or once :meth:`attach`.
    Times in seconds count from the first step, and what is due happens as the next step begins.

    Args:
        plan: or its text, as of :meth:`Plan.parse`.
        name: of this process, for ``who=`` and as a part of the seed: processes with different names meet different
            schedules.
        life: of this process, counted from 0, for ``life=`` and as a part of the seed. What torchrun says
            (``TORCHELASTIC_RESTART_COUNT``) by default.
        links: that the network faults of the plan are done to.

    Raises:
        ValueError: the plan is not one, or has a fault that is not possible here.
    """

    def __init__(
        self, plan: Plan | str, *, name: str = "", life: int | None = None, links: Iterable[Link] = ()
    ) -> None:
        self.plan = Plan.parse(plan) if isinstance(plan, str) else plan
        self._name = name
        self._schedule = Schedule(self.plan, name, config.RESTART_COUNT.read() if life is None else life)
        self._performer = Performer(self.plan, True, links)
        self._attached: Manager | None = None

    @property
    def acts(self) -> list[Act]:
        """What was done so far."""
        return list(self._performer.acts)

    def on_step(self, step: int) -> None:
        """Does what is due, in the thread that calls.

        Args:
            step: that begins now.

        Raises:
            BaseException: what a ``raise`` of the plan says.
            OSError: a fault could not be done.
            ValueError: a disk has more space than may be filled.
        """
        due = self._schedule.due_at(self._performer.elapsed()) + self._schedule.due_in(step)
        for fault, rng in due:
            self._performer.perform(fault, rng, step, {self._name: None})

    def attach(self, manager: Manager) -> Injector:
        """Calls :meth:`on_step` with ``manager.current_step()`` before each ``manager.start_quorum()``, until
        :meth:`close`. Where this has no name, ``who=`` means the name that the manager's replica id begins with.

        Raises:
            RuntimeError: it is attached to another manager.
        """
        if self._attached is not None:
            raise RuntimeError("this injector is attached to a manager: close it first, or make another one")
        if not self._name:
            self._name = manager.replica_id().partition(":")[0]
        start_quorum = manager.start_quorum

        def start_quorum_with_faults(*args: Any, **kwargs: Any) -> None:
            self.on_step(manager.current_step())
            start_quorum(*args, **kwargs)

        vars(manager)["start_quorum"] = start_quorum_with_faults
        self._attached = manager
        return self

    def close(self) -> None:
        """Leaves the manager and ends what lasts. Idempotent."""
        if self._attached is not None:
            vars(self._attached).pop("start_quorum", None)
            self._attached = None
        self._performer.release()

    def __enter__(self) -> Injector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
