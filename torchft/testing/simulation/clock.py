"""Time in the simulated world: one true time, and what each process makes of it.

The idea
    The world has one time, which nobody in it can see. A process reads a monotonic clock of its own, which starts
    anywhere and runs a little too fast or too slow. The core is only ever given such local times, so a rule that
    silently compares the clocks of two machines fails here.

Rules
    - A clock never goes back, not even over a pause: CLOCK_MONOTONIC runs on while a process is stopped.
    - The rate of a clock stays within ``1 ± drift``, the bound that the protocol's lease is safe for
      (docs/simulation.md).
"""

from __future__ import annotations

__all__ = ["Clock"]


class Clock:
    """A process's monotonic clock.

    Args:
        rate: its seconds per true second.
        offset: what it shows at true time 0, in seconds.
    """

    __slots__ = ("offset", "rate")

    def __init__(self, rate: float = 1.0, offset: float = 0.0) -> None:
        self.rate = rate
        self.offset = offset

    def read(self, now: float) -> float:
        """What it shows at the true time ``now``."""
        return self.offset + self.rate * now

    def true(self, seconds: float) -> float:
        """How long it truly takes until it shows ``seconds`` more."""
        return seconds / self.rate
