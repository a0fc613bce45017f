"""The sizes and times of a simulated job.

Times are in simulated seconds and much shorter than a real job's, in the same proportions: what matters is which of
two things happens first. A run takes milliseconds, whatever they are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """One job. All times are in simulated seconds."""

    replicas: int = 3
    """Groups at the beginning."""
    ranks: int = 1
    """In each group."""
    lighthouses: int = 1
    """More than one: standbys, and a register for the leader's seat."""
    record_members: bool = True
    """A lighthouse's record holds the members of the last quorum, not the epoch alone."""
    min_replicas: int = 1
    """Of the lighthouse."""
    min_replica_size: int = 1
    """Of the managers: fewer participants do not commit."""
    fixed_with_spares: bool = False
    """``WorldSizeMode.FIXED_WITH_SPARES`` instead of ``DYNAMIC``."""
    async_quorum: bool = True
    init_sync: bool = True
    heartbeat_timeout: float = 1.0
    join_timeout: float = 0.3
    lease: float = 4.0
    """How long a standing quorum may go on without contact to the lighthouse."""
    seat_lease: float = 2.0
    """How long the register keeps the leader's seat."""
    collective_timeout: float = 1.5
    quorum_timeout: float = 9.0
    connect_timeout: float = 1.5
    step_time: float = 0.25
    """Of a forward and backward pass, more or less."""
    transfer_time: float = 0.2
    """Of a heal, more or less."""
    drift: float = 0.02
    """How far the rate of a clock may be from 1."""
    duration: float = 8.0
    """In which faults begin."""

    @property
    def recovery_bound(self) -> float:
        """Seconds after the end of the last fault within which every live replica commits again (invariant 6).

        The longest story: a takeover waits until the lease and the heartbeat timeout are over, a leader is found
        first where there are standbys, those who waited meanwhile ran into the deadline of their call and ask anew,
        and the first steps afterwards fail by their collectives' timeouts, because one more has to be left behind.
        """
        return (
            self.lease
            + self.quorum_timeout
            + (2 * self.seat_lease if self.lighthouses > 1 else 0.0)
            + 4 * self.heartbeat_timeout
            + 4 * self.collective_timeout
            + 2 * self.join_timeout
            + 10 * self.step_time
        )

    def text(self) -> str:
        """What differs from the defaults, as :meth:`parse` reads it."""
        return " ".join(f"{f.name}={_show(getattr(self, f.name))}" for f in fields(self) if self._differs(f.name))

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Settings, name))

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Reads ``name=value`` pairs.

        Raises:
            ValueError: there is no such name, or the value is not of its kind.
        """
        values: dict[str, object] = {}
        for item in text.split():
            name, _, value = item.partition("=")
            default = getattr(cls, name, None)
            if not name.isidentifier() or not isinstance(default, bool | int | float):
                known = ", ".join(f.name for f in fields(cls))
                raise ValueError(f"{item!r} is not a setting; there are: {known}")
            try:
                values[name] = value == "yes" if isinstance(default, bool) else type(default)(value)
            except ValueError:
                raise ValueError(f"{item!r}: that is no {type(default).__name__}") from None
        return cls(**values)  # type: ignore[arg-type]


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
