"""What the kernel says of a process (Linux)."""

from __future__ import annotations

from pathlib import Path

from torchft.testing.wait import wait_until

__all__ = ["lives", "stat_of", "state_of", "wait_until_stopped"]


def stat_of(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` from the state on: proc(5), the third and what follows.

    Raises:
        OSError: there is no such process.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state_of(pid: int) -> str:
    """R: it runs, S: it waits, T: it is stopped, Z: it has ended and nobody has taken notice, and so on.

    Raises:
        OSError: there is no such process.
    """
    return stat_of(pid)[0]


def lives(pid: int) -> bool:
    """It has not ended, whether or not anybody has taken notice of that."""
    try:
        return state_of(pid) != "Z"
    except OSError:
        return False


def wait_until_stopped(pid: int, timeout: float = 60.0) -> None:
    """Until it stands still, by SIGSTOP.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds.
        OSError: there is no such process.
    """
    wait_until(lambda: state_of(pid) == "T", timeout, f"the stop of process {pid}")
