"""What is to go wrong, and when: faults at a step or at a rate, drawn from a seed.

Rules:

- A plan is a plain value. The same plan with the same seed, name and life gives the same schedule, on any machine.
- ``at_step=N`` happens once in a life of the process, when step N begins; if it is jumped over (by healing past it), it
  does not happen. ``every=S`` happens at random times, S seconds apart on average (exponential, like the failures of
  many independent machines). ``every_steps=N`` happens at each step that N divides, except 0.
- Each fault of a plan, each name and each life has random numbers of its own: adding a fault does not move those
  before it, and a process that was killed does not meet the same schedule again.
- With ``once=PATH`` a fault happens once in all lives: whoever creates that file may act.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torchft.testing.faults.kinds import options_of
from torchft.testing.faults.text import Written, read_plan, write_fault

__all__ = ["Fault", "Plan", "Schedule"]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Args:
        kind: one of :data:`KINDS`.
        options: of the kind: ``{"seconds": 2.0}``.
        at_step: the step at which it happens, or
        every: average seconds between two times, or
        every_steps: steps between two times. Exactly one of the three.
        seed: of its times and victims; None: the plan's.
        life: the life of the process in which it happens, counted from 0; None: each.
        once: a file that marks that it has happened; None: it is not marked.
        who: pattern (``replica_*``) of the names of the injector, victim or link it is for; None: all.

    Raises:
        ValueError: kind, options or time are not such.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    at_step: int | None = None
    every: float | None = None
    every_steps: int | None = None
    seed: int | None = None
    life: int | None = None
    once: str | None = None
    who: str | None = None

    def __post_init__(self) -> None:
        options_of(self.kind, self.options)
        times = [t for t in (self.at_step, self.every, self.every_steps) if t is not None]
        if len(times) != 1:
            raise ValueError(f"{self.kind} needs exactly one of step=7, every=3s and every=10steps")
        if self.at_step is None and times[0] <= 0:
            raise ValueError(f"{self.kind} cannot happen every {times[0]:g}: a positive time is needed")

    def is_for(self, name: str) -> bool:
        return self.who is None or fnmatchcase(name, self.who)

    def __str__(self) -> str:
        return write_fault(
            Written(
                self.kind,
                self.options,
                {
                    "at_step": self.at_step,
                    "every": self.every,
                    "every_steps": self.every_steps,
                    "seed": self.seed,
                    "life": self.life,
                    "once": self.once,
                    "who": self.who,
                },
            )
        )


@dataclass(frozen=True)
class Plan:
    """Faults, in the order in which they happen where several are due at once.

    Args:
        faults: of the plan.
        seed: of the faults that have none of their own.
    """

    faults: tuple[Fault, ...]
    seed: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Plan:
        """A plan from a command line: ``kill@step=7; stop(2s)@every=30s,seed=4``.

        Faults are separated by ``;``. Each is ``kind(options)@when``, with ``when`` made of ``step=7``, ``every=3s`` or
        ``every=10steps`` and, all optional, ``seed=4``, ``life=0`` (or ``life=first``), ``once=FILE`` and
        ``who=PATTERN``. Options stand in their order or by name: ``fill_disk(/data, leave=1MiB)``. What has a comma,
        a semicolon or a bracket in it is quoted: ``raise(ValueError, "a, b")``.

        Args:
            text: to parse. Nothing in it: a plan of nothing.
            seed: of the faults that name none.

        Raises:
            ValueError: the message has the part that is wrong and lists what there is.
        """
        faults = []
        for part, written in read_plan(text):
            try:
                faults.append(Fault(written.kind, written.options, **written.when))
            except ValueError as e:
                raise ValueError(f"in {part!r}: {e}") from None
        return cls(tuple(faults), seed)

    def times(self, seconds: float, name: str = "", life: int = 0) -> list[tuple[float, Fault]]:
        """When the faults with a rate in seconds happen in the first ``seconds`` seconds: a preview, in order."""
        schedule = Schedule(self, name, life)
        found: list[tuple[float, Fault]] = []
        while (due := schedule.next_time()) is not None and due <= seconds:
            found += [(due, fault) for fault, _ in schedule.due_at(due)]
        return found

    def __str__(self) -> str:
        """As :meth:`parse` reads it, given the same seed."""
        return "; ".join(map(str, self.faults))


class Schedule:
    """What of a plan is due: pure, and told step and time.

    Args:
        plan: of faults.
        name: of the one whose schedule it is, a part of the seed.
        life: of the process, counted from 0.
    """

    def __init__(self, plan: Plan, name: str = "", life: int = 0) -> None:
        self._last_step: int | None = None
        self._done: set[int] = set()
        self._faults: list[tuple[Fault, random.Random]] = []
        self._clocks: dict[int, tuple[float, Iterator[float]]] = {}
        for index, fault in enumerate(plan.faults):
            key = f"{plan.seed if fault.seed is None else fault.seed}|{index}|{name}|{life}"
            self._faults.append((fault, random.Random(f"{key}|victims")))
            if fault.life not in (None, life):
                self._done.add(index)
            elif fault.every is not None:
                times = _arrivals(fault.every, random.Random(f"{key}|times"))
                self._clocks[index] = (next(times), times)

    def due_in(self, step: int) -> list[tuple[Fault, random.Random]]:
        """The faults that happen as ``step`` begins, each with the random numbers for its victims.

        A step that is tried again after a failed commit is not a new one.
        """
        found: list[tuple[Fault, random.Random]] = []
        for index, (fault, rng) in enumerate(self._faults):
            if index in self._done:
                continue
            if fault.at_step == step:
                self._done.add(index)
                found.append((fault, rng))
            elif fault.every_steps and step and step % fault.every_steps == 0 and step != self._last_step:
                found.append((fault, rng))
        self._last_step = step
        return found

    def due_at(self, seconds: float) -> list[tuple[Fault, random.Random]]:
        """The faults with a rate whose time has come by then, each once: times that were missed do not add up."""
        found: list[tuple[float, int]] = []
        for index, (due, times) in self._clocks.items():
            if due <= seconds:
                found.append((due, index))
                self._clocks[index] = (next(t for t in times if t > seconds), times)
        return [self._faults[index] for _, index in sorted(found)]

    def next_time(self) -> float | None:
        """When :meth:`due_at` will have something; None: never."""
        return min((due for due, _ in self._clocks.values()), default=None)


def _arrivals(mean: float, rng: random.Random) -> Iterator[float]:
    now = 0.0
    while True:
        now += rng.expovariate(1 / mean)
        yield now
