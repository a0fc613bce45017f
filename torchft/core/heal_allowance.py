"""How long a group that heals may hold the others up, and when a transfer under way is given up for it.

The idea
    While one group waits for a state, that group's work is lost; while it takes the state, everybody's is. How long the
    way will stay slow nobody knows, so it is decided as one decides between renting and buying skis: wait, and pay the
    larger price when the small ones have become worth it. What a heal takes from the others is then at most about a
    tenth of the time, whatever the state is like, and over a sound way nobody waits for ever (decision 22).

Rules
    - A heal of :data:`FREE` seconds is not worth waiting for, nor one no longer than a *step* of the others: it runs
      beside a part of that step. One that takes longer is made after ten times as long of waiting, which held nobody
      up. It never takes longer than a transfer may, the *timeout*.
    - No waiting pays for a way of less than :data:`SLOWEST`: that is a fault, to be mended and not to be paid for. What
      comes over it is only what is not worth waiting for.
    - A *bound* that somebody has set takes the place of all these: what takes longer is never begun.
    - A transfer under way is given up where it would take more than twice as long as it may, and the longer part is
      still to come. So one that is nearly there is never thrown away, and what a wrong guess costs is bounded.
"""

from __future__ import annotations

import math

__all__ = ["FREE", "SLOWEST", "allowance", "hopeless", "seconds_until_allowed"]

FREE = 2.0
"""Seconds."""
SLOWEST = 2e6
"""Bytes a second (16 Mbit/s): no sound network between the machines of a job carries less."""
_WAITED = 10.0
"""Seconds of waiting for one of a heal."""


def allowance(
    waited: float, timeout: float, bound: float | None = None, step: float = 0.0, rate: float = math.inf
) -> float:
    """Seconds that a heal may hold the others up.

    Args:
        waited: seconds that the group has waited for a state.
        timeout: seconds that a transfer may take.
        bound: as it was set; None: it was not.
        step: seconds that a step of the others takes; 0: not known.
        rate: bytes a second of the way to the state, as it was measured.
    """
    if bound is not None:
        return min(timeout, bound)
    return min(timeout, max(FREE, step, waited / _WAITED if rate >= SLOWEST else 0.0))


def seconds_until_allowed(
    needed: float,
    waited: float,
    timeout: float,
    bound: float | None = None,
    step: float = 0.0,
    rate: float = math.inf,
) -> float | None:
    """Until a heal of ``needed`` seconds will be allowed, if the way stays as it is; None: never."""
    if needed <= allowance(waited, timeout, bound, step, rate):
        return 0.0
    if bound is not None or needed > timeout or rate < SLOWEST:
        return None
    return max(0.0, _WAITED * needed - waited)


def hopeless(passed: float, rest: float, time_left: float, allowed: float) -> bool:
    """Whether a transfer is so slow that it is better given up.

    Args:
        passed: seconds since it began.
        rest: seconds that what is still to come would take.
        time_left: seconds until it is given up in any case.
        allowed: seconds that all of it may take.
    """
    return rest > 2 * time_left or (rest > passed and passed + rest > 2 * allowed)
