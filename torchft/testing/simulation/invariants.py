"""What must never happen: the seven invariants of the protocol, checked after each event that can break one.

The idea
    The checker sees what nobody in the simulated world can see: all replicas at once. Each check is made at the one
    event that can break it (a commit, a quorum that forms, a heal, a wait that ends), so a violation is found at
    the very event that is to blame.

Invariants (docs/protocol.md), and what exactly is checked
    1. Replicas that commit step k under one quorum id used the same participants and divisor: compared with the
       first that committed (quorum id, k). The divisor is also the number of those that contributed, but in the
       first step with ``init_sync``, where all but the primary contribute zeros and count.
    2. No two quorums without a common member commit the same step from different ancestors: once a quorum has
       committed, no older one without a common member commits any more, dead processes aside.
    3. A replica's committed step never goes back, and only a heal skips forward. One whose own state was lost in an
       earlier heal that did not end well takes what there is, as a new one does.
    4. Replicas at the same step hold bit-identical state: of those that work together. All who contribute to a
       collective do so from one state, and end with one.
    5. A quorum id never means two different memberships, over restarts and over all lighthouses.
    6. When the last fault is over, every live replica commits again within :attr:`Settings.recovery_bound
       <torchft.testing.simulation.settings.Settings.recovery_bound>`.
    7. No call waits past its deadline, the time in which its process was stopped aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torchft.core.membership import Quorum
from torchft.testing.simulation.trace import show_id
from torchft.testing.simulation.world import World

__all__ = ["TORN", "Commit", "Invariants", "Violation"]

TORN = -1
"""A state that is half written."""


@dataclass(frozen=True)
class Violation:
    """An invariant that was broken."""

    invariant: int
    at: float
    """True time in seconds."""
    who: str
    what: str

    def __str__(self) -> str:
        return f"invariant {self.invariant} broken at {self.at:.4f} s by {self.who}: {self.what}"


@dataclass(frozen=True, slots=True)
class Commit:
    """A rank committed a step."""

    replica_id: str
    rank: int
    quorum_id: int
    members: tuple[str, ...]
    step: int
    participants: tuple[int, ...]
    divisor: int
    ancestor: int
    """The state it started from."""
    state: int
    """The state it holds now."""


@dataclass(slots=True)
class _Group:
    """What is known of all quorums with one id."""

    members: tuple[str, ...]
    last_commit: float = -1.0


class Invariants:
    """The checker of one run.

    Args:
        world: told to stop at the first violation.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.violation: Violation | None = None
        self._quorums: dict[int, _Group] = {}
        self._first: dict[tuple[int, int, int], Commit] = {}
        self._steps: dict[tuple[str, int], int] = {}
        self._newest = 0
        self._failed: set[tuple[int, int]] = set()

    def broken(self, invariant: int, who: str, what: str) -> None:
        """Reports a violation; the first one counts."""
        if self.violation is None:
            self.violation = Violation(invariant, self.world.now, who, what)
            self.world.stopped = True
            self.world.tell(who, "VIOLATION of invariant %s: %s", invariant, what)

    # --------------------------------------------------------------- quorums

    def named(self, quorum: Quorum, who: str) -> None:
        """A lighthouse formed this quorum, or a member was given it."""
        known = self._quorums.get(quorum.quorum_id)
        if known is None:
            self._quorums[quorum.quorum_id] = _Group(quorum.replica_ids)
        elif known.members != quorum.replica_ids:
            self.broken(
                5,
                who,
                f"quorum {show_id(quorum.quorum_id)} is of {list(quorum.replica_ids)}, and was of "
                f"{list(known.members)}",
            )

    # --------------------------------------------------------------- commits

    def committed(self, commit: Commit, others: Iterable[int]) -> None:
        """A rank committed.

        Args:
            commit: what.
            others: the states from which those that count contributed to it.
        """
        who = commit.replica_id
        if (commit.quorum_id, commit.step) in self._failed:
            self.world.point("partial commit", who)
        first = self._first.setdefault((commit.quorum_id, commit.step, commit.rank), commit)
        if first is commit:
            self.world.point("first commit", who.partition(":")[0])
        else:
            self._agree(first, commit)
        if len(commit.participants) != commit.divisor and commit.step > 0:
            self.broken(1, who, f"it divided the sum of {len(commit.participants)} participants by {commit.divisor}")
        for state in others:
            if state != commit.ancestor:
                what = "a half-written state" if TORN in (state, commit.ancestor) else "different states"
                self.broken(
                    4, who, f"step {commit.step} of quorum {show_id(commit.quorum_id)} was computed from {what}"
                )
        self._follows(commit)
        last = self._steps.get((who, commit.rank))
        if last is not None and commit.step != last + 1:
            self.broken(3, who, f"after step {last} it committed step {commit.step}")
        self._steps[who, commit.rank] = commit.step

    def failed(self, quorum_id: int, step: int, rank: int, who: str) -> None:
        """A rank did not commit a step that it had begun."""
        self._failed.add((quorum_id, step))
        if (quorum_id, step, rank) in self._first:
            self.world.point("partial commit", who)

    def _agree(self, first: Commit, commit: Commit) -> None:
        of = f"step {commit.step} of quorum {show_id(commit.quorum_id)}"
        if (first.participants, first.divisor) != (commit.participants, commit.divisor):
            self.broken(
                1,
                commit.replica_id,
                f"{of}: participants {list(commit.participants)} and divisor {commit.divisor}, but "
                f"{list(first.participants)} and {first.divisor} at {first.replica_id}",
            )
        elif first.state != commit.state:
            self.broken(4, commit.replica_id, f"{of}: its state is not the one of {first.replica_id}")

    def _follows(self, commit: Commit) -> None:
        """Invariant 2."""
        group = self._quorums.get(commit.quorum_id)
        if group is None:
            group = self._quorums[commit.quorum_id] = _Group(commit.members)
        group.last_commit = self.world.now
        if commit.quorum_id >= self._newest:
            self._newest = commit.quorum_id
            return
        mine = set(group.members)
        for quorum_id, other in self._quorums.items():
            if quorum_id > commit.quorum_id and other.last_commit >= 0 and mine.isdisjoint(other.members):
                self.broken(
                    2,
                    commit.replica_id,
                    f"it commits step {commit.step} in quorum {show_id(commit.quorum_id)} of {sorted(mine)}, "
                    f"although quorum {show_id(quorum_id)} of {list(other.members)} has committed since",
                )

    def healed(self, replica_id: str, rank: int, step: int, state: int, had_state: bool) -> None:
        """A rank took over a state in which ``step`` is the next to be committed."""
        if state == TORN:
            self.broken(4, replica_id, f"it healed from a half-written state at step {step}")
        last = self._steps.get((replica_id, rank))
        if last is not None and step < last + 1 and had_state:
            self.broken(3, replica_id, f"after step {last} was committed a heal took it back to step {step}")
        self._steps[replica_id, rank] = step - 1

    # ----------------------------------------------------------------- waits

    def waited(self, who: str, what: str, over: float) -> None:
        """A call has waited ``over`` seconds of its process's time longer than its deadline."""
        self.broken(7, who, f"its {what} waits {over:.3f} s past its deadline")
