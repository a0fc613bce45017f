"""The vote of the ranks of one group, and the gathering of their quorum requests.

The idea
    A group acts as one: it asks for a quorum when all its ranks ask, and it commits when all its ranks vote yes.
    Both are a *round*: a set of expected ranks, those that have come, and one end. A rank that goes away while
    others wait ends the round at once for all of them, instead of leaving them to their deadlines.

Rules
    - A round ends when all ranks have come, or fails when one that had come goes away before that.
    - A rank that comes to a failed round learns at once that it failed; when all ranks have learnt it, or one that
      has comes anew, the next round begins. So a late rank never opens a round that nobody else will join.
    - A rank that comes twice to an open round replaces its first call: the caller gave that one up.
    - A commit round is about one step. A vote for another step than the one that other ranks wait on fails it,
      naming both: the ranks of the group have come apart.
    - A rank that asks for the next quorum votes no more on this step: who waits for its vote is answered at once.
    - A new quorum round (``reset``) clears an older vote: the group has moved on.

Invariants
    - Each call that came is answered at most once, and all calls of a round get the same decision.
    - The decision is true only if every rank of the group voted true in that round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["CommitVote", "Decision", "Gather", "Gathered"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gathered(Generic[T]):
    """What a gathering has to tell its shell."""

    complete: dict[int, T] | None = None
    """All ranks have come: what each brought. The round is over and a new one open."""
    failed: str | None = None
    """The round failed, with the cause: answer ``answer`` with it."""
    answer: tuple[int, ...] = ()
    """The ranks to be answered with ``failed``."""
    superseded: int | None = None
    """The earlier call of this rank is given up: end it with an error."""


class Gather(Generic[T]):
    """Waits until each rank ``0 … world_size - 1`` has brought something.

    Args:
        world_size: ranks in the group, at least 1.
        what: the name of the thing in messages, for instance ``quorum``.
    """

    def __init__(self, world_size: int, what: str) -> None:
        if world_size < 1:
            raise ValueError(f"a group has at least one rank, not {world_size}")
        self.world_size = world_size
        self._what = what
        self._here: dict[int, T] = {}
        self._failed: str | None = None
        self._told: set[int] = set()

    @property
    def waiting(self) -> tuple[int, ...]:
        """The ranks that have come to the open round."""
        return tuple(sorted(self._here))

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(r for r in range(self.world_size) if r not in self._here)

    def values(self) -> list[T]:
        """What the ranks that have come to the open round brought, by rank."""
        return [self._here[r] for r in sorted(self._here)]

    def come(self, rank: int, value: T) -> Gathered[T]:
        """A rank comes and waits.

        Raises:
            ValueError: there is no such rank in the group.
        """
        self.check(rank)
        if self._failed is not None:
            cause = self._failed
            if rank not in self._told:
                self._tell({rank})
                return Gathered(failed=cause, answer=(rank,))
            self.clear()  # it knows, and comes anew: the others will too
        superseded = rank if rank in self._here else None
        self._here[rank] = value
        if len(self._here) < self.world_size:
            return Gathered(superseded=superseded)
        complete = dict(sorted(self._here.items()))
        self.clear()
        return Gathered(complete=complete, superseded=superseded)

    def check(self, rank: int) -> None:
        """Raises ``ValueError`` if there is no such rank in the group."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a group of {self.world_size} ranks")

    def leave(self, rank: int, cause: str) -> Gathered[T]:
        """A rank that waited is gone, or no longer waits. Nothing happens if it did not wait."""
        if rank not in self._here:
            return Gathered()
        return self.fail(f"rank {rank} left the {self._what}: {cause}", gone=rank)

    def fail(self, cause: str, gone: int | None = None, also: int | None = None) -> Gathered[T]:
        """Ends the round for all that wait, and for those still to come.

        Args:
            cause: what they are told.
            gone: this one need not be told: it left.
            also: this one is to be told as well, though it does not wait.
        """
        told = {*self._here} if also is None else {*self._here, also}
        answer = tuple(r for r in sorted(told) if r != gone)
        self._here = {}
        self._failed = cause
        self._tell(told)
        return Gathered(failed=cause, answer=answer)

    def _tell(self, ranks: set[int]) -> None:
        self._told |= ranks
        if len(self._told) >= self.world_size:
            self.clear()

    def clear(self) -> None:
        """Forgets the round, as if no rank had come."""
        self._here = {}
        self._failed = None
        self._told = set()


@dataclass(frozen=True, slots=True)
class Decision:
    """What a vote has to tell its shell."""

    decided: bool | None = None
    """The group's decision, for the ranks in ``answer``."""
    cause: str | None = None
    """Why the decision is no, where it is not simply a rank's own no."""
    answer: tuple[int, ...] = ()
    superseded: int | None = None


class CommitVote:
    """The vote on one step after the other.

    Args:
        world_size: ranks in the group, at least 1.
    """

    def __init__(self, world_size: int) -> None:
        self._round: Gather[bool] = Gather(world_size, "commit vote")
        self._step: int | None = None

    def vote(self, rank: int, step: int, commit: bool) -> Decision:
        """A rank votes on ``step`` and waits for the decision.

        Raises:
            ValueError: there is no such rank in the group.
        """
        self._round.check(rank)
        waiting = self._round.waiting
        others = [r for r in waiting if r != rank]
        if others and step != self._step:
            cause = f"rank {rank} votes on step {step} while ranks {others} vote on {self._step}"
            failed = self._round.fail(cause, also=rank)
            return Decision(False, cause, failed.answer, rank if rank in waiting else None)
        self._step = step
        got = self._round.come(rank, commit)
        if got.complete is None:
            return self._decision(got)
        noes = [str(r) for r, yes in got.complete.items() if not yes]
        why = f"rank{'s' if len(noes) > 1 else ''} {', '.join(noes)} voted no" if noes else None
        return Decision(not noes, why, tuple(got.complete), got.superseded)

    def leave(self, rank: int, cause: str) -> Decision:
        """A rank that voted no longer waits: the decision is no for the others, at once."""
        return self._decision(self._round.leave(rank, cause))

    def gone_on(self, rank: int) -> Decision:
        """A rank asks for the next quorum while others wait for its vote: the decision is no for them, at once."""
        if not self._round.waiting:
            return Decision()
        return self._decision(self._round.fail(f"rank {rank} asks for the next quorum, and has not voted", gone=rank))

    def reset(self) -> None:
        """The group has moved on to its next quorum: a vote that failed before it is over for everybody."""
        if not self._round.waiting:
            self._round.clear()

    def _decision(self, got: Gathered[bool]) -> Decision:
        if got.failed is not None:
            return Decision(False, got.failed, got.answer, got.superseded)
        return Decision(superseded=got.superseded)
