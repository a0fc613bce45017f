"""All cores busy: processes that compute for some seconds beside the training."""

from __future__ import annotations

import os
import subprocess
import sys

from torchft.testing.faults.announcing import announce
from torchft.testing.faults.effect import Effect

__all__ = ["busy"]

_SPIN = """
import os, sys, time
parent, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and os.getppid() == parent:
    sum(range(100000))
"""
"""Ends by itself at its time, or when the process that started it is gone."""


def busy(seconds: float, processes: int | None = None) -> Effect:
    """Loads the machine's cores with child processes. Returns at once.

    Args:
        seconds: how long.
        processes: how many; None: one for each core.

    Returns:
        Releasing it ends the load.

    Raises:
        ValueError: ``processes`` is below 1.
    """
    count = processes if processes is not None else os.cpu_count() or 1
    if count < 1:
        raise ValueError(f"{count} processes make no load")
    announce("busy", "this machine", f"{count} processes, {seconds:g} s")
    children: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        for child in children:
            child.kill()
        for child in children:
            child.wait()

    try:
        for _ in range(count):
            children.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _SPIN, str(os.getpid()), str(seconds)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # whoever reads ours need not wait for its end
                )
            )
    except BaseException:
        end()
        raise
    return Effect("busy", end, seconds)
