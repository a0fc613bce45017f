"""All timeouts of a job in one place: what each is for, sane values, and which contradict each other.

The idea
    Nobody should have to tune timeouts: a process that dies is seen in milliseconds and one that is stopped within
    the lighthouse's heartbeat timeout, whatever the values here are. They only end what nobody sees: a hang inside
    a collective whose members all live, a link that swallows packets, a lighthouse that does not come back. So
    they may be generous, as long as those that wait for others outlast what they wait for. docs/timeouts.md tells
    it with a picture.

Rules (each is checked when a :class:`Timeouts` is made)
    - The commit vote of a group outlasts a collective: one rank votes at once, another may wait in a collective
      until its timeout. A vote that gives up earlier fails steps that are only slow.
    - A quorum outlasts the lighthouse's heartbeat timeout: until a silent death is known no quorum can form. It
      outlasts the join timeout for the same reason.
    - Heartbeats (for a lighthouse without sessions) come at least twice per heartbeat timeout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta

from torchft import config
from torchft.runtime.deadline import LONGEST

__all__ = ["Timeouts", "effective", "suggest"]

_ZERO = timedelta(0)


def _seconds(value: timedelta) -> str:
    return f"{value.total_seconds():g} s"


@dataclass(frozen=True)
class Timeouts:
    """The timeouts of a job's trainers, and what they assume of its lighthouse.

    Pass it to the trainers as ``Manager(timeouts=…)`` and to the lighthouse by :meth:`lighthouse_flags`. What is longer
    than ten years, such as ``timedelta.max`` for "never", is cut to them: the system's clocks cannot wait for more.

    Raises:
        TypeError: one is no timedelta.
        ValueError: two of them contradict each other, or one is not positive. The message says which and why.
    """

    collective: timedelta = timedelta(seconds=60)
    """Longest wait for a collective, and for a state transfer. While a group heals in the background, the others'
    first collective waits for it: this is longer than a transfer takes."""
    commit: timedelta | None = None
    """Longest wait for the other ranks' votes; by default a tenth, and at least 5 s, more than ``collective``."""
    quorum: timedelta = timedelta(seconds=60)
    """Longest wait for a quorum. A lighthouse that is away is waited for that long."""
    connect: timedelta = timedelta(seconds=60)
    """How long an address that does not answer yet is tried."""
    heartbeat_interval: timedelta = timedelta(milliseconds=100)
    """Between heartbeats to a lighthouse that knows no sessions."""
    heartbeat_timeout: timedelta | None = timedelta(seconds=5)
    """Of the lighthouse: how long a group may be silent before it counts as dead. None: not known yet."""
    join_timeout: timedelta | None = timedelta(milliseconds=100)
    """Of the lighthouse: how long a quorum that could form waits for living groups that have not asked yet. None: not
    known yet."""
    heal_pause: timedelta | None = None
    """Longest that a heal may hold the other groups up: see :class:`torchft.manager.Manager`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, timedelta):
                raise TypeError(
                    f"{field.name} is {value!r}: a timeout is a datetime.timedelta, timedelta(seconds={value!r})"
                )
            if value is not None:
                object.__setattr__(self, field.name, min(value, LONGEST))
        if self.commit is None:
            more = max(self.collective / 10, timedelta(seconds=5))
            object.__setattr__(self, "commit", min(self.collective + more, LONGEST))
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name != "join_timeout" and value is not None and value <= _ZERO:
                raise ValueError(f"{name} is {_seconds(value)}: a timeout must be positive")
        if self.join_timeout is not None and self.join_timeout < _ZERO:
            raise ValueError(f"join_timeout is {_seconds(self.join_timeout)}: it must not be negative")
        contradictions = self.contradictions(self.heartbeat_timeout, self.join_timeout)
        if contradictions:
            raise ValueError("; ".join(contradictions))

    def contradictions(self, heartbeat_timeout: timedelta | None, join_timeout: timedelta | None) -> list[str]:
        """What does not fit together with a lighthouse that has these values, each with the reason and the way out."""
        found: list[str] = []
        assert self.commit is not None
        if self.commit < self.collective:
            found.append(
                f"commit ({_seconds(self.commit)}) is shorter than collective ({_seconds(self.collective)}): a rank "
                f"that votes at once would give up on one whose collective is only slow, and every slow step would "
                f"fail. Leave commit unset, or make it longer than collective"
            )
        if heartbeat_timeout is not None and self.quorum <= heartbeat_timeout:
            found.append(
                f"quorum ({_seconds(self.quorum)}) is not longer than the lighthouse's heartbeat_timeout "
                f"({_seconds(heartbeat_timeout)}): when a group falls silent no quorum forms until that is over, "
                f"so each attempt would fail meanwhile. Make quorum longer, or --heartbeat_timeout_ms shorter"
            )
        # Equal are the defaults of the Manager and of the lighthouse's command.
        if join_timeout is not None and self.quorum < join_timeout:
            found.append(
                f"quorum ({_seconds(self.quorum)}) is shorter than the lighthouse's join_timeout "
                f"({_seconds(join_timeout)}): a quorum that waits for a slow group would fail before it forms. "
                f"Make quorum longer, or --join_timeout_ms shorter"
            )
        if heartbeat_timeout is not None and 2 * self.heartbeat_interval > heartbeat_timeout:
            found.append(
                f"heartbeat_interval ({_seconds(self.heartbeat_interval)}) is more than half of heartbeat_timeout "
                f"({_seconds(heartbeat_timeout)}): one late heartbeat would count as a death"
            )
        return found

    def lighthouse_flags(self) -> str:
        """The flags of ``torchft_lighthouse`` that fit."""
        assert self.heartbeat_timeout is not None
        assert self.join_timeout is not None
        return (
            f"--heartbeat_timeout_ms {round(1000 * self.heartbeat_timeout.total_seconds())} "
            f"--join_timeout_ms {round(1000 * self.join_timeout.total_seconds())}"
        )


def suggest(*, step_seconds: float, state_bytes: int = 0, bytes_per_second: float = 1e9) -> Timeouts:
    """Timeouts for a job of which little is known.

    Args:
        step_seconds: length of a training step, of the slowest group.
        state_bytes: what a healing rank receives: parameters and optimizer state.
        bytes_per_second: of the network between groups; 1 GB/s by default.

    Raises:
        ValueError: an argument is negative or zero where that makes no sense.
    """
    if step_seconds <= 0 or state_bytes < 0 or bytes_per_second <= 0:
        raise ValueError("step_seconds and bytes_per_second must be positive, state_bytes not negative")
    transfer = 3 * state_bytes / bytes_per_second  # three times slower than it should be is not a failure yet
    collective = timedelta(seconds=max(30.0, 10 * step_seconds + transfer))
    # A group that is in the middle of a step asks when it is through: waiting two steps for it loses nobody.
    join_timeout = timedelta(seconds=min(60.0, max(0.1, 2 * step_seconds)))
    heartbeat_timeout = timedelta(seconds=5)
    quorum = max(timedelta(seconds=60), 2 * join_timeout + 2 * heartbeat_timeout, collective)
    return Timeouts(
        collective=collective, quorum=quorum, heartbeat_timeout=heartbeat_timeout, join_timeout=join_timeout
    )


def effective(
    given: Timeouts | None,
    timeout: timedelta,
    quorum: timedelta,
    connect: timedelta,
    heartbeat_interval: timedelta,
    heal_pause: timedelta | None = None,
) -> Timeouts:
    """What a Manager uses: the environment's, else those ``given``, else its arguments.

    Args:
        given: where its ``heal_pause`` is None, the argument counts.

    The lighthouse's own are not known yet.

    Raises:
        ValueError: two of them contradict each other, or one is not positive.
    """
    collective = config.TIMEOUT_SEC.read()
    return Timeouts(
        collective=collective or (given.collective if given else timeout),
        commit=given.commit if given and collective is None else None,
        quorum=config.QUORUM_TIMEOUT_SEC.read() or (given.quorum if given else quorum),
        connect=config.CONNECT_TIMEOUT_SEC.read() or (given.connect if given else connect),
        heartbeat_interval=given.heartbeat_interval if given else heartbeat_interval,
        heartbeat_timeout=None,
        join_timeout=None,
        heal_pause=config.HEAL_PAUSE_SEC.read() or ((given and given.heal_pause) or heal_pause),
    )
