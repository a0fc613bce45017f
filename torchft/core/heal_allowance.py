"""How long a group that heals may hold the others up, and when a transfer under way is given up for it.

The idea
    While one group waits for a state, that group's work is lost; while it takes the state, everybody's is. How long the
    way will stay slow nobody knows, so it is decided as one decides between renting and buying skis: wait, and pay the
    larger price when the small ones have become worth it. What a heal takes from the others is then at most about a
    tenth of the time, whatever the way and the state are like, and nobody waits for ever (decision 22).

Rules
    - A heal of :data:`FREE` seconds is not worth waiting for, nor one no longer than a *step* of the others: it runs
      beside a part of that step. One that takes longer is made after ten times as long of waiting, which held nobody
      up. It never takes longer than a transfer may, the *timeout*.
    - A *bound* that somebody has set takes the place of all these: what takes longer is never begun.
    - A transfer under way is given up where it would take more than twice as long as it may, and the longer part is
      still to come. So one that is nearly there is never thrown away, and what a wrong guess costs is bounded.
"""

from __future__ import annotations

__all__ = ["FREE", "allowance", "hopeless", "seconds_until_allowed"]

FREE = 2.0
"""Seconds."""
_WAITED = 10.0
"""Seconds of waiting for one of a heal."""


def allowance(waited: float, timeout: float, bound: float | None = None, step: float = 0.0) -> float:
    """Seconds that a heal may hold the others up.

    Args:
        waited: seconds that the group has waited for a state.
        timeout: seconds that a transfer may take.
        bound: as it was set; None: it was not.
        step: seconds that a step of the others takes; 0: not known.
    """
    return min(timeout, max(FREE, step, waited / _WAITED) if bound is None else bound)


def seconds_until_allowed(
    needed: float, waited: float, timeout: float, bound: float | None = None, step: float = 0.0
) -> float | None:
    """Until a heal of ``needed`` seconds will be allowed, if the way stays as it is; None: never."""
    if needed <= allowance(waited, timeout, bound, step):
        return 0.0
    if bound is not None or needed > timeout:
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
