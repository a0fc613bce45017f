"""What a training group did, read from the file in which it says so.

The examples append one JSON object a line to ``METRICS_FILE``: ``{"event": "step", "time": unix seconds,
"pid": …, "step": …, "participants": …, "loss": …}`` and so on. :class:`Watch` follows such a file and keeps
the facts.

Events: ``start`` (a process is up), ``step`` (committed), ``failed`` (not committed), ``healed`` (took a
peer's state: ``step``, ``bytes``), ``end`` (``step``, ``accuracy`` 0 to 1, ``state``: a hash).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Commit", "End", "Heal", "Transfer", "Watch", "transfers"]


@dataclass(frozen=True)
class Commit:
    """A committed step."""

    time: float
    step: int
    participants: int
    loss: float


@dataclass(frozen=True)
class Heal:
    """A state taken from a peer."""

    time: float
    step: int
    bytes: int


@dataclass(frozen=True)
class End:
    """The end of a training."""

    step: int
    accuracy: float
    state: str


@dataclass(frozen=True)
class Transfer:
    """A state received, as the transport logged it: verified, so hashing is part of the seconds."""

    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:.1f} MB in {self.seconds:.3f} s ({self.bytes / 1e9 / self.seconds:.2f} GB/s)"


class Watch:
    """Follows one life of one group. Lines that are not whole yet are left for the next :meth:`look`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started: float | None = None
        self.commits: list[Commit] = []
        self.heals: list[Heal] = []
        self.failed_steps = 0
        self.end: End | None = None
        self._offset = 0

    def look(self) -> None:
        """Reads what was added since the last look.

        Raises:
            ValueError: a line is not an event.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return
        whole, newline, _ = added.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except (KeyError, TypeError, ValueError) as e:
                raise ValueError(f"{self.path}: not an event: {line!r} ({e})") from e

    @property
    def step(self) -> int:
        """The newest step known to be committed, 0 before the first."""
        return max(
            self.commits[-1].step if self.commits else 0,
            self.heals[-1].step if self.heals else 0,
        )

    def _take(self, event: object) -> None:
        if not isinstance(event, dict):
            raise ValueError("not an object")
        number = {key: float(value) for key, value in event.items() if isinstance(value, (int, float))}
        match event["event"]:
            case "start":
                self.started = number["time"]
            case "step":
                self.commits.append(
                    Commit(number["time"], int(number["step"]), int(number["participants"]), number["loss"])
                )
            case "failed":
                self.failed_steps += 1
            case "healed":
                self.heals.append(Heal(number["time"], int(number["step"]), int(number["bytes"])))
            case "end":
                self.end = End(int(number["step"]), number["accuracy"], str(event["state"]))
            case unknown:
                raise ValueError(f"unknown event {unknown!r}")


_RECEIVED = re.compile(r"received.*?(?P<bytes>\d+) bytes.*? in (?P<seconds>[\d.]+) ?s")


def transfers(log: Iterable[str]) -> list[Transfer]:
    """The transfers that a process logged, in order.

    Args:
        log: its lines, those of a checkpoint transport's receiver among them.
    """
    found = (_RECEIVED.search(line) for line in log if "torchft.checkpointing" in line)
    return [Transfer(int(m["bytes"]), float(m["seconds"])) for m in found if m]
