"""The world: one queue of events, and the processes that they happen to.

The idea
    Everything that happens is an entry of one queue, ordered by true time and then by the order of scheduling. So a
    run is a function of its seed and its faults alone: the same again, however often, on any machine.

Rules
    - An event that belongs to a process happens only to the life of the process that it was meant for: what was
      under way to one that crashed is lost.
    - A stopped process (SIGSTOP) neither acts nor sees time. What falls due meanwhile waits, and happens all at
      once as it is continued: timers and messages in the order of their times, or all timers first.
    - What is checked is checked after each event, not at the end: :class:`torchft.testing.simulation.invariants`.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from torchft.testing.simulation.clock import Clock
from torchft.testing.simulation.trace import Trace

__all__ = ["Process", "Timer", "World"]

Timer = list[Any]
"""An entry of the queue: ``[when, order, process, life, function, arguments, is_timer]``; function None: cancelled."""


class World:
    """The queue, the true time, chance, and what was seen.

    Args:
        seed: of everything that is left to chance.
        trace: what a person can read afterwards.
    """

    def __init__(self, seed: int, trace: Trace | None = None) -> None:
        self.now = 0.0
        self.seed = seed
        self.rng = random.Random(seed)
        self.trace = trace
        self.seen: Counter[str] = Counter()
        """How often each thing happened that a run is worth running for: takeovers, adoptions, partial commits."""
        self.events = 0
        self.stopped = False
        self.on_point: Callable[[str, str], None] | None = None
        """Told of each protocol point that is passed, and by whom: faults wait for them."""
        self._queue: list[Timer] = []
        self._order = 0

    # -------------------------------------------------------- what will happen

    def at(self, when: float, function: Callable[..., object], *args: Any) -> Timer:
        """Calls at a true time, whoever lives then."""
        self._order += 1
        entry: Timer = [when, self._order, None, 0, function, args, True]
        heapq.heappush(self._queue, entry)
        return entry

    def to(self, process: Process, delay: float, function: Callable[..., object], *args: Any) -> None:
        """Something reaches a process after ``delay`` true seconds."""
        self._order += 1
        heapq.heappush(self._queue, [self.now + delay, self._order, process, process.life, function, args, False])

    def wake(self, process: Process, seconds: float, function: Callable[..., object], args: tuple[Any, ...]) -> Timer:
        """A timer of a process, by its own clock."""
        self._order += 1
        entry: Timer = [
            self.now + seconds / process.clock.rate, self._order, process, process.life, function, args, True,
        ]  # fmt: skip
        heapq.heappush(self._queue, entry)
        return entry

    def run(self, until: float) -> None:
        """Lets things happen until the true time ``until``, or until :attr:`stopped`."""
        queue, pop = self._queue, heapq.heappop
        while queue and not self.stopped:
            entry = pop(queue)
            function = entry[4]
            if function is None:
                continue
            if entry[0] > until:
                heapq.heappush(queue, entry)
                break
            process = entry[2]
            if process is not None:
                if process.life != entry[3]:
                    continue
                if process.paused:
                    process.backlog.append(entry)
                    continue
            self.now = entry[0]
            self.events += 1
            function(*entry[5])
        if not self.stopped:
            self.now = max(self.now, until)

    def again(self, backlog: list[Timer]) -> None:
        """What waited for a stopped process happens now, in this order."""
        for entry in backlog:
            self._order += 1
            entry[0], entry[1] = self.now, self._order
            heapq.heappush(self._queue, entry)

    # --------------------------------------------------------- what did happen

    def tell(self, who: str, what: str, *values: object) -> None:
        """A line of the trace: ``what`` is a format with ``%s``; nothing is formatted while nobody reads."""
        if self.trace is not None:
            self.trace.add(self.now, who, what % values if values else what)

    def point(self, name: str, who: str) -> None:
        """A protocol point is passed. Counted, and faults may wait for it."""
        self.seen[name] += 1
        if self.on_point is not None:
            self.on_point(name, who)


class Process:
    """A process that can be stopped, killed and started again.

    Args:
        world: where it lives.
        name: in traces and faults.
        clock: its own.
    """

    def __init__(self, world: World, name: str, clock: Clock) -> None:
        self.world = world
        self.name = name
        self.clock = clock
        self.life = 0
        """Which life of it this is; 0: it has not been started."""
        self.alive = False
        self.paused = False
        self.resumed_at = -1.0
        """True time."""
        self.host_up = True
        """False: nobody there refuses or answers anything, although the process is dead."""
        self.backlog: list[Timer] = []

    @property
    def time(self) -> float:
        """What its own clock shows."""
        return self.clock.offset + self.clock.rate * self.world.now

    def after(self, seconds: float, function: Callable[..., object], *args: Any) -> Timer:
        """Sets a timer by its own clock."""
        return self.world.wake(self, seconds, function, args)

    def begin_life(self) -> None:
        """It is started: nothing that was meant for an earlier life reaches it."""
        self.life += 1
        self.alive, self.paused, self.host_up = True, False, True
        self.backlog = []

    def end_life(self, host: bool = False) -> None:
        """It is gone; with ``host`` its whole machine."""
        self.life += 1
        self.alive, self.paused = False, False
        self.host_up = not host
        self.backlog = []

    def pause(self) -> None:
        """SIGSTOP."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT."""
        if not self.paused:
            return
        self.paused = False
        self.resumed_at = self.world.now
        backlog, self.backlog = self.backlog, []
        if self.world.rng.random() < 0.5:
            backlog.sort(key=lambda entry: not entry[6])  # all timers first; the order is kept otherwise
        self.world.again(backlog)
