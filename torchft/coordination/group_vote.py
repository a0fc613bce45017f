"""The commit vote of a group's ranks, and what follows from it for the next step.

The core counts (:class:`torchft.core.commit.CommitVote`); this carries its decisions to those who wait. Two things are
added when all have voted yes: the quorum's lease must hold, for which the lighthouse's word is waited for where it has
run out; and in a group of several ranks the answer says whether the next step stands, so that no rank need ask.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from dataclasses import dataclass, replace

from torchft.coordination.standing_link import StandingLink
from torchft.core.commit import CommitVote, Decision
from torchft.core.standing_member import MayCommit
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import RankLogger
from torchft.runtime.worker import Worker, end_with

__all__ = ["Ballot", "GroupVote", "Voted"]

_WAIT_FOR_LEASE = 60.0
"""Seconds that a vote of several ranks waits for the lighthouse, where the lease has run out; ranks give up before."""


@dataclass(frozen=True)
class Voted:
    """The group's decision."""

    commit: bool
    next_stands: bool = False
    """The next step has begun, for all ranks, with the quorum there is."""


Ballot = concurrent.futures.Future[Voted]


class GroupVote:
    """From any thread.

    Args:
        world_size: ranks in the group.
        standing: the group's standing quorum.
        worker: for what has to wait.
        log: of the group.
    """

    def __init__(self, world_size: int, standing: StandingLink, worker: Worker, log: RankLogger) -> None:
        self._world_size = world_size
        self._standing = standing
        self._worker = worker
        self._log = log
        self._lock = threading.Lock()
        self._vote = CommitVote(world_size)
        self._ballots: dict[int, Ballot] = {}
        self._said: set[str] = set()  # since the last commit; a group that waits for a state has one cause for many

    def alone(self, step: int, commit: bool, deadline: Deadline) -> bool:
        """The vote of a group of one rank: there is nobody to wait for, but perhaps the lighthouse."""
        why = self._standing.wait_to_commit(deadline) if commit else ""
        if why:
            self._log.warning("the step is not committed: %s", why)
        self._standing.ended(step, commit and not why)
        return commit and not why

    def cast(self, rank: int, step: int, commit: bool) -> Ballot:
        """Casts a vote; the future is the group's decision.

        Raises:
            ValueError: there is no such rank in the group.
        """
        ballot: Ballot = concurrent.futures.Future()
        with self._lock:
            earlier = self._ballots.get(rank)
            decision = self._vote.vote(rank, step, commit)
            self._ballots[rank] = ballot
            answered = self._take(decision)
        if decision.superseded is not None and earlier is not None:
            end_with(earlier, RuntimeError(f"rank {rank} voted again"))
        self._conclude(step, answered, decision)
        return ballot

    def uncast(self, rank: int, ballot: Ballot, cause: str) -> bool:
        """The rank that waits on this ballot gave up, or died: the vote fails for the others.

        Returns:
            False: it is decided already, and the others do as was decided.
        """
        with self._lock:
            if self._ballots.get(rank) is not ballot:
                return False
            del self._ballots[rank]
            decision = self._vote.leave(rank, cause)
            answered = self._take(decision)
        self._conclude(-1, answered, decision)
        return True

    def gone_on(self, rank: int) -> None:
        """A rank asks for the next quorum: it does not vote on the step that others vote on. Without it they would wait
        for each other."""
        with self._lock:
            own = self._ballots.pop(rank, None)
            decision = self._vote.gone_on(rank)
            answered = self._take(decision)
        if own is not None:
            end_with(own, RuntimeError(f"rank {rank} asks for the next quorum"))
        self._conclude(-1, answered, decision)

    def reset(self) -> None:
        """The group has moved on to its next quorum."""
        with self._lock:
            self._vote.reset()

    def end(self, cause: str) -> None:
        """Ends what ranks of this group wait for, with an error."""
        with self._lock:
            ballots, self._ballots = self._ballots, {}
            for rank in ballots:
                self._vote.leave(rank, cause)
        for ballot in ballots.values():
            end_with(ballot, RuntimeError(f"no commit in this group: {cause}"))
        self._standing.ended(-1, False)

    def _take(self, decision: Decision) -> list[Ballot]:
        return [self._ballots.pop(rank) for rank in decision.answer if rank in self._ballots]

    def _conclude(self, step: int, ballots: list[Ballot], decision: Decision) -> None:
        if decision.decided is None:
            return
        if decision.decided and self._standing.may_commit() is MayCommit.WAIT:
            self._worker.submit(lambda: self._tell(step, ballots, decision, _WAIT_FOR_LEASE))
            return
        self._tell(step, ballots, decision, 0.0)

    def _tell(self, step: int, ballots: list[Ballot], decision: Decision, patience: float) -> None:
        if decision.decided:
            why = self._standing.wait_to_commit(Deadline(patience))
            if why:
                decision = replace(decision, decided=False, cause=why)
        self._standing.ended(step, bool(decision.decided))
        next_stands = bool(decision.decided) and self._world_size > 1 and self._standing.stands(step + 1)
        if not decision.decided and decision.cause:
            new = decision.cause not in self._said
            self._said.add(decision.cause)
            level = logging.WARNING if new and self._world_size > 1 else logging.DEBUG
            self._log.log(level, "the step is not committed: %s", decision.cause)
        elif decision.decided:
            self._said.clear()
        for ballot in ballots:
            end_with(ballot, Voted(bool(decision.decided), next_stands))
