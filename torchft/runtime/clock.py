"""The clock of leases. It goes on while the machine sleeps, as that of whoever granted the lease does."""

from __future__ import annotations

import time

__all__ = ["lease_clock"]

_BOOT = getattr(time, "CLOCK_BOOTTIME", None)


def lease_clock() -> float:
    """Seconds that only grow."""
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)
