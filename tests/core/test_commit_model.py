"""``CommitVote`` and ``Gather``: each call followed from its coming to its one answer.

``Calls`` is a shell as simple as can be: it knows which call of which rank waits, and checks each answer against
the promises of the module as it comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.core.commit import CommitVote, Decision, Gather

Event = tuple[str, int, int, bool]
"""What happens, to which rank, its step and its vote."""

events = st.tuples(
    st.sampled_from(["vote"] * 8 + ["leave", "reset"]),
    st.integers(0, 3),
    st.sampled_from([5] * 5 + [6]),
    st.sampled_from([True] * 5 + [False]),
)


@dataclass
class Calls:
    """The calls that wait, and what has become of the others."""

    world_size: int
    waiting: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """By rank: the step and the vote."""
    ignorant: set[int] = field(default_factory=set)
    """The ranks that have not heard yet that the last round failed."""

    def expected(self, rank: int, step: int, commit: bool) -> tuple[bool | None, set[int], int | None]:
        """The decision (None: wait), whom it is told, and whose earlier call is given up."""
        superseded = rank if rank in self.waiting else None
        others = {r: v for r, v in self.waiting.items() if r != rank}
        if not self.waiting and rank in self.ignorant:
            self.ignorant.discard(rank)
            return False, {rank}, None
        if any(s != step for s, _ in others.values()):
            self.waiting = {}
            self.ignorant = set(range(self.world_size)) - set(others) - {rank}
            return False, {*others, rank}, superseded
        self.ignorant = set()
        self.waiting[rank] = (step, commit)
        if len(self.waiting) < self.world_size:
            return None, set(), superseded
        decision = all(yes for _, yes in self.waiting.values())
        self.waiting = {}
        return decision, set(range(self.world_size)), superseded

    def leaves(self, rank: int) -> set[int]:
        """Whom a no is told because this rank leaves."""
        if rank not in self.waiting:
            return set()
        told = set(self.waiting) - {rank}
        self.ignorant = set(range(self.world_size)) - set(self.waiting)
        self.waiting = {}
        return told


@settings(max_examples=400)
@given(world_size=st.integers(1, 4), script=st.lists(events, max_size=40))
def test_vote_answers_as_the_rules_say(world_size: int, script: list[Event]) -> None:
    vote = CommitVote(world_size)
    calls = Calls(world_size)
    for what, any_rank, step, commit in script:
        rank = any_rank % world_size
        if what == "vote":
            got = vote.vote(rank, step, commit)
            assert (got.decided, set(got.answer), got.superseded) == calls.expected(rank, step, commit)
        elif what == "leave":
            waited = rank in calls.waiting
            got = vote.leave(rank, "its process died")
            assert set(got.answer) == calls.leaves(rank)
            assert got.decided == (False if waited else None)
            assert (got.cause is not None) == waited
        else:
            vote.reset()
            if not calls.waiting:
                calls.ignorant = set()


@settings(max_examples=400)
@given(world_size=st.integers(1, 4), script=st.lists(events, max_size=40))
def test_every_call_is_answered_once_and_yes_only_by_all(world_size: int, script: list[Event]) -> None:
    vote = CommitVote(world_size)
    pending: dict[int, tuple[int, bool]] = {}

    def answer(got: Decision) -> None:
        assert len(set(got.answer)) == len(got.answer)
        assert (got.decided is None) == (got.answer == () and got.cause is None)
        cast = {r: pending.pop(r) for r in got.answer}  # a KeyError here: an answer to nobody
        if got.decided:
            assert sorted(cast) == list(range(world_size))
            assert all(yes for _, yes in cast.values())
            assert len({step for step, _ in cast.values()}) == 1
        elif got.decided is False:
            assert got.cause, "a no has a cause"

    for what, any_rank, step, commit in script:
        rank = any_rank % world_size
        if what == "vote":
            before = pending.get(rank)
            pending[rank] = (step, commit)
            got = vote.vote(rank, step, commit)
            assert (got.superseded == rank) == (before is not None), "a call given up is named, and only that"
            answer(got)
        elif what == "leave" and rank in pending:
            del pending[rank]
            answer(vote.leave(rank, "its process died"))
            assert not pending, "when one leaves nobody waits on"
        elif what == "reset":
            vote.reset()
        assert len(pending) < world_size, "nobody waits when all have come"
        assert len({step for step, _ in pending.values()}) <= 1


@settings(max_examples=200)
@given(world_size=st.integers(1, 4), start=st.lists(events, max_size=20))
def test_group_that_asks_for_a_quorum_votes_cleanly_after_any_past(world_size: int, start: list[Event]) -> None:
    vote = CommitVote(world_size)
    waiting: set[int] = set()
    for what, any_rank, step, commit in start:
        rank = any_rank % world_size
        if what == "vote":
            waiting.add(rank)
            waiting -= set(vote.vote(rank, step, commit).answer)
        elif what == "leave" and rank in waiting:
            waiting -= {rank, *vote.leave(rank, "gone").answer}
    for rank in waiting:  # their calls end before they ask for the next quorum
        vote.leave(rank, "its deadline passed")
    vote.reset()
    for rank in range(world_size - 1):
        assert vote.vote(rank, 7, True) == Decision()
    assert vote.vote(world_size - 1, 7, True) == Decision(True, None, tuple(range(world_size)))


@settings(max_examples=200)
@given(
    world_size=st.integers(1, 4),
    script=st.lists(st.tuples(st.sampled_from(["come"] * 6 + ["leave"]), st.integers(0, 3)), max_size=40),
)
def test_gathering_hands_over_the_newest_call_of_each_rank(world_size: int, script: list[tuple[str, int]]) -> None:
    gather: Gather[int] = Gather(world_size, "quorum")
    pending: dict[int, int] = {}
    for number, (what, any_rank) in enumerate(script):
        rank = any_rank % world_size
        if what == "come":
            assert gather.waiting == tuple(sorted(pending))
            assert gather.values() == [pending[r] for r in sorted(pending)]
            assert gather.missing == tuple(r for r in range(world_size) if r not in pending)
            repeated = rank in pending
            pending[rank] = number
            got = gather.come(rank, number)
            assert got.superseded == (rank if repeated else None)
            if got.complete is not None:
                assert got.complete == pending
                assert list(got.complete) == list(range(world_size))
                pending = {}
            elif got.failed is not None:
                assert got.answer == (rank,)
                del pending[rank]
                assert not pending, "a failed round is never joined"
        else:
            waited = rank in pending
            pending.pop(rank, None)
            got = gather.leave(rank, "its call ended")
            assert (got.failed is not None) == waited
            if waited:
                assert got.answer == tuple(sorted(pending))
                assert "rank " + str(rank) in (got.failed or "")
                pending = {}
