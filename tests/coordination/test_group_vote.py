"""A vote that all ranks have voted yes in, while the quorum's lease has run out: who ends it, and what that says."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from torchft.coordination.group_vote import Ballot, GroupVote
from torchft.coordination.proto import session_pb2
from torchft.coordination.standing_link import StandingLink
from torchft.coordination.standing_wire import grant_to_wire
from torchft.core.assignment import Seating
from torchft.core.membership import Member, Quorum
from torchft.core.standing_member import MayCommit
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import RankLogger
from torchft.runtime.worker import Worker
from torchft.testing.wait import wait_until

QUORUM = 7
RANKS = 3
LOG = RankLogger(logging.getLogger(__name__), "a", 0, lambda: 0)


def let_the_lease_run_out(link: StandingLink) -> None:
    """Step 0 of a quorum of two groups is under way, whose lease is over."""
    link.welcomed(session_pb2.Welcome(lease_ms=1, heartbeat_timeout_ms=5000))
    link.asks(0, 0)
    members = tuple(Member(name, world_size=RANKS, standing=True) for name in "ab")
    seating = Seating(Quorum(QUORUM, members, fenced=True, stands=True))
    link.answered(session_pb2.Answer(grant=grant_to_wire(seating, members[0], True)))
    wait_until(lambda: link.may_commit() is MayCommit.WAIT)


class Waiting:
    """A vote that waits for the lease."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.link = StandingLink("a", RANKS, LOG)
        let_the_lease_run_out(self.link)
        self.vote = GroupVote(RANKS, self.link, worker, LOG)
        self.ballots: list[Ballot] = [self.vote.cast(rank, 0, True) for rank in range(RANKS)]
        wait_until(lambda: self.link._changed._waiters)  # type: ignore[attr-defined]

    def decisions(self, *ranks: int) -> list[bool]:
        return [self.ballots[rank].result(20).commit for rank in ranks]

    def waits_no_more(self) -> None:
        """What the group asks next finds its worker free."""
        self.worker.submit(lambda: None).result(20)
        assert self.link.asks(1, 0) == 0, "the next question says that a step was not committed"


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    worker = Worker("torchft-test")
    yield Waiting(worker)
    worker.shutdown()


def test_the_word_of_the_lighthouse_commits_it(waiting: Waiting) -> None:
    assert not any(ballot.done() for ballot in waiting.ballots)
    waiting.link.introduce(session_pb2.Hello())
    waiting.link.welcomed(session_pb2.Welcome(lease_ms=300_000, heartbeat_timeout_ms=5000, quorum_id=QUORUM))
    assert waiting.decisions(0, 1, 2) == [True, True, True]
    assert not waiting.vote.uncast(1, waiting.ballots[1], "its deadline passed"), "it is decided"


def test_a_rank_that_gives_up_ends_it_for_all_and_learns_what_was_waited_for(waiting: Waiting) -> None:
    why = waiting.vote.uncast(1, waiting.ballots[1], "its deadline passed")
    assert "the lease of this group's quorum ran out" in why
    assert "Is it running" in why
    assert waiting.decisions(0, 2) == [False, False], "none commits what another one has given up"
    waiting.waits_no_more()
    assert not waiting.vote.uncast(2, waiting.ballots[2], "its deadline passed")


def test_the_death_of_a_rank_ends_it_for_the_others(waiting: Waiting) -> None:
    waiting.vote.end("rank 2 of this group is no longer there")
    for ballot in waiting.ballots:
        with pytest.raises(RuntimeError, match="no commit in this group: rank 2 of this group is no longer there"):
            ballot.result(20)
    waiting.waits_no_more()


def test_a_rank_that_asks_for_the_next_quorum_ends_it_for_all(waiting: Waiting) -> None:
    waiting.vote.gone_on(1)
    assert waiting.decisions(0, 2) == [False, False]
    with pytest.raises(RuntimeError, match="rank 1 asks for the next quorum"):
        waiting.ballots[1].result(20)
    waiting.waits_no_more()


def test_the_next_vote_is_not_touched_by_the_one_that_was_given_up(waiting: Waiting) -> None:
    waiting.vote.end("rank 2 of this group is no longer there")
    waiting.vote.reset()
    let_the_lease_run_out(waiting.link)
    again = [waiting.vote.cast(rank, 0, True) for rank in range(RANKS)]
    waiting.link.introduce(session_pb2.Hello())
    waiting.link.welcomed(session_pb2.Welcome(lease_ms=300_000, heartbeat_timeout_ms=5000, quorum_id=QUORUM))
    assert [ballot.result(20).commit for ballot in again] == [True, True, True]


def test_who_gave_up_waits_for_no_lease_of_a_later_quorum() -> None:
    link, deadline = StandingLink("a", RANKS, LOG), Deadline(20)
    let_the_lease_run_out(link)
    assert link.wait_to_commit(deadline, lambda: True)
    assert not deadline.expired
