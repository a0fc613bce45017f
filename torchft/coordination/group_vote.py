"""The commit vote of a group's ranks, and what follows from it for the next step.

The core counts (:class:`torchft.core.commit.CommitVote`); this carries its decisions to those who wait. Two things are
added when all have voted yes: the quorum's lease must hold, for which the lighthouse's word is waited for where it has
run out; and in a group of several ranks the answer says whether the next step stands, so that no rank need ask.

While the lighthouse is waited for, nothing is decided yet: a rank that gives up, dies or goes on ends the vote for all
of them at once, with a no.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from dataclasses import dataclass

from torchft.coordination.lighthouses import LIGHTHOUSE_HINT
from torchft.coordination.standing_link import LEASE_RAN_OUT, StandingLink
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


@dataclass(eq=False)
class _Verdict:
    """What a vote came to, and who is to be told."""

    step: int
    commit: bool
    cause: str | None
    ballots: dict[int, Ballot]


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
        self._waiting: _Verdict | None = None  # a yes of all ranks, which waits for the lease
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
            verdict = self._take(step, decision)
            if verdict is not None and verdict.commit and self._standing.may_commit() is MayCommit.WAIT:
                self._waiting = waiting = verdict
                self._worker.submit(lambda: self._wait_for_lease(waiting))
                verdict = None
        if decision.superseded is not None and earlier is not None:
            end_with(earlier, RuntimeError(f"rank {rank} voted again"))
        self._tell(verdict)
        return ballot

    def uncast(self, rank: int, ballot: Ballot, cause: str) -> str:
        """The rank that waits on this ballot gave up, or died: the vote fails for the others.

        Returns:
            What it waited for, and what a person can try; empty: the vote is decided already, and the others do as was
            decided.
        """
        verdict: _Verdict | None
        with self._lock:
            waiting = self._waiting
            if waiting is not None and waiting.ballots.get(rank) is ballot:
                waited_for = f"all ranks have voted yes, and {LEASE_RAN_OUT}. {LIGHTHOUSE_HINT}"
                verdict = self._give_up(waiting, rank, cause)
            elif self._ballots.get(rank) is ballot:
                waited_for = f"a rank of this group of {self._world_size} has not voted. Does it still run?"
                del self._ballots[rank]
                verdict = self._take(-1, self._vote.leave(rank, cause))
            else:
                return ""
        self._tell(verdict)
        return waited_for

    def gone_on(self, rank: int) -> None:
        """A rank asks for the next quorum: it does not vote on the step that others vote on. Without it they would wait
        for each other."""
        cause = f"rank {rank} asks for the next quorum"
        verdict: _Verdict | None
        with self._lock:
            own = self._ballots.pop(rank, None)
            waiting = self._waiting
            if waiting is not None and rank in waiting.ballots:
                own, verdict = waiting.ballots[rank], self._give_up(waiting, rank, cause)
            else:
                verdict = self._take(-1, self._vote.gone_on(rank))
        if own is not None:
            end_with(own, RuntimeError(cause))
        self._tell(verdict)

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
            ended = list(ballots.values())
            if self._waiting is not None:
                ended += self._waiting.ballots.values()
                self._waiting = None
        for ballot in ended:
            end_with(ballot, RuntimeError(f"no commit in this group: {cause}"))
        self._standing.ended(-1, False)

    def _take(self, step: int, decision: Decision) -> _Verdict | None:
        """Takes the ballots of those who are to be told."""
        if decision.decided is None:
            return None
        ballots = {rank: self._ballots.pop(rank) for rank in decision.answer if rank in self._ballots}
        return _Verdict(step, decision.decided, decision.cause, ballots)

    def _give_up(self, waiting: _Verdict, rank: int, cause: str) -> _Verdict:
        """A rank does not wait for the lease any more. Returns what that means for the others."""
        self._waiting = None
        others = {other: ballot for other, ballot in waiting.ballots.items() if other != rank}
        return _Verdict(waiting.step, False, f"rank {rank} left the commit vote: {cause}; {LEASE_RAN_OUT}", others)

    def _wait_for_lease(self, verdict: _Verdict) -> None:
        def given_up() -> bool:
            return self._waiting is not verdict

        why = self._standing.wait_to_commit(Deadline(_WAIT_FOR_LEASE), given_up)
        with self._lock:
            if given_up():
                return  # all have been told
            self._waiting = None
        if why:
            verdict.commit, verdict.cause = False, why
        self._tell(verdict)

    def _tell(self, verdict: _Verdict | None) -> None:
        if verdict is None:
            return
        if verdict.commit and (why := self._standing.wait_to_commit(Deadline(0.0))):
            verdict.commit, verdict.cause = False, why
        self._standing.ended(verdict.step, verdict.commit)
        next_stands = verdict.commit and self._world_size > 1 and self._standing.stands(verdict.step + 1)
        if verdict.commit:
            self._said.clear()
        elif verdict.cause:
            new = verdict.cause not in self._said
            self._said.add(verdict.cause)
            level = logging.WARNING if new and self._world_size > 1 else logging.DEBUG
            self._log.log(level, "the step is not committed: %s", verdict.cause)
        for ballot in verdict.ballots.values():
            end_with(ballot, Voted(verdict.commit, next_stands))
