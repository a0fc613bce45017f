"""What happened, for a person: one line an event, with the time, who, and what.

A run that is only counted keeps no trace; a run that fails is run again with one, which shows the same since a run
is a function of its seed and its faults.
"""

from __future__ import annotations

__all__ = ["Trace", "show_id"]


def show_id(quorum_id: int) -> str:
    """A quorum id as ``epoch.number``."""
    return f"{quorum_id >> 32}.{quorum_id & 0xFFFFFFFF}"


class Trace:
    """Lines in the order of their happening."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str, str]] = []

    def add(self, now: float, who: str, what: str) -> None:
        """Something happened at the true time ``now``, in seconds."""
        self.lines.append((now, who, what))

    def text(self, last: int | None = None) -> str:
        """All of it, or only the ``last`` so many lines, as a table."""
        lines = self.lines if last is None else self.lines[-last:]
        width = max((len(who) for _, who, _ in lines), default=0)
        left = len(self.lines) - len(lines)
        head = [f"… {left} lines before"] if left else []
        return "\n".join(head + [f"{now:9.4f}  {who:<{width}}  {what}" for now, who, what in lines])
