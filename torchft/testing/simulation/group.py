"""A replica group's server, in the process of its rank 0.

Mirrors ``coordination/manager_server.py`` (it passes on who is no longer there), ``coordination/quorum_round.py`` (it
gathers the ranks' requests and asks the lighthouse once for all of them), ``coordination/group_vote.py`` (the commit
vote, which may wait for the lease) and ``coordination/standing_link.py`` (between the session and the steps). The
machines of ``core/standing_member.py``, ``core/commit.py`` and ``core/assignment.py`` decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchft.coordination.types import ANY_QUORUM, Notice
from torchft.core.assignment import AssignmentError, View, assign, of_group
from torchft.core.commit import CommitVote, Decision, Gather
from torchft.core.membership import Member, Quorum
from torchft.core.standing import Decide, Over, Prepare
from torchft.core.standing_member import Grant, MayCommit, StandingMember
from torchft.testing.simulation.invariants import Invariants
from torchft.testing.simulation.link import Link, Server
from torchft.testing.simulation.network import Network
from torchft.testing.simulation.settings import Settings
from torchft.testing.simulation.world import Process

if TYPE_CHECKING:
    from torchft.testing.simulation.trainer import Trainer

__all__ = ["Ask", "GroupServer"]


@dataclass(slots=True, eq=False)
class Ask:
    """A rank's request for a quorum."""

    rank: int
    step: int
    lineage: int
    shrink_only: bool
    commit_failures: int
    timed_out: bool
    answer: Callable[[View | None, Exception | None], None]
    """Given this rank's view, or None and the cause."""


class GroupServer:
    """One life of a group's server.

    Args:
        process: of rank 0.
        replica_id: of this life.
        net: the network.
        servers: the lighthouses.
        settings: of the job.
        invariants: told of each quorum that is used.
        assign, standing: of the core; a test gives others.
    """

    def __init__(
        self,
        process: Process,
        replica_id: str,
        net: Network,
        servers: Sequence[Server],
        settings: Settings,
        invariants: Invariants,
        assign: Callable[[Quorum, str, int, bool], View] = assign,
        standing: StandingMember | None = None,
    ) -> None:
        self.process = process
        self.replica_id = replica_id
        self.trainers: list[Trainer] = []
        self._settings = settings
        self._invariants = invariants
        self._assign = assign
        self._gather: Gather[Ask] = Gather(settings.ranks, "quorum")
        self._vote = CommitVote(settings.ranks)
        self._ballots: dict[int, Callable[[bool, str, bool], None]] = {}
        self._dead_ranks: dict[int, str] = {}
        self._asked = False
        self._attempt = 0
        self._seen_step = 0
        self._asking: tuple[list[Ask], Member] | None = None
        self.asked_step = 0
        """Of the newest request; below 0: the group held no usable state."""
        self.standing = standing or StandingMember()
        self._quorum: Quorum | None = None
        self._views: dict[int, View] = {}
        """Of that quorum while it stands, by rank."""
        self._verdict: tuple[Decision, int] | None = None
        """A vote that waits for the lease, and its step."""
        self._left: Callable[[], None] | None = None
        self.link = Link(process, net, servers, self, settings.heartbeat_timeout)

    # ---------------------------------------------------------------- quorum

    def come(self, ask: Ask) -> None:
        """A rank asks for the group's next quorum."""
        self._dead_ranks.pop(ask.rank, None)
        if self._dead_ranks:
            ask.answer(None, RuntimeError(f"no quorum for this group: {next(iter(self._dead_ranks.values()))}"))
            return
        got = self._gather.come(ask.rank, ask)
        if got.failed is not None:
            ask.answer(None, RuntimeError(f"no quorum for this group: {got.failed}"))
        if got.complete is not None:
            self._vote.reset()
            self._ask_lighthouse(list(got.complete.values()))

    def give_up(self, ask: Ask) -> None:
        """A rank's deadline has passed."""
        waiting = {a.rank: a for a in self._gather.values()}
        if waiting.get(ask.rank) is ask:
            got = self._gather.leave(ask.rank, "its deadline passed")
            for rank in got.answer:
                waiting[rank].answer(None, RuntimeError(f"no quorum for this group: {got.failed}"))
        else:
            self._asking = None
            self.link.withdraw()

    def _ask_lighthouse(self, asks: list[Ask]) -> None:
        self._asked = True
        self._attempt += 1
        step, lineage = of_group((a.step, a.lineage) for a in asks)
        self.asked_step = step
        member = Member(
            self.replica_id,
            address=self.process.name,
            store_address=self.process.name,
            step=step,
            lineage=lineage,
            world_size=len(asks),
            shrink_only=any(a.shrink_only for a in asks),
            commit_failures=max(a.commit_failures for a in asks),
            timed_out=any(a.timed_out for a in asks),
            attempt=self._attempt,
            standing=True,
            uses=self.standing.uses(step),
            seen_step=self._seen_step,
        )
        self.process.world.tell(
            self.process.name, "asks for a quorum at step %s (%s failures)", member.step, member.commit_failures
        )
        self._asking = asks, member
        self.link.ask(member, lambda quorum, cause, sent_at: self._answered(asks, member, quorum, cause, sent_at))
        if not self.link.stands:
            self._wait_for_session(self._attempt)

    def _wait_for_session(self, attempt: int) -> None:
        """A question without a session waits for one for a moment, then the group looks whether it may go on."""
        self.process.after(self._settings.heartbeat_timeout / 2, self._go_on, attempt)

    def _go_on(self, attempt: int) -> None:
        if self._asking is None or attempt != self._attempt or self.link.stands:
            return
        asks, member = self._asking
        if not member.commit_failures and self.stands(member.step):
            self.process.world.point("went on", self.process.name)
            self.link.forget()
            self._answer(asks, self._quorum, "")
        else:
            self._wait_for_session(attempt)

    def _answered(self, asks: list[Ask], member: Member, quorum: Quorum | None, cause: str, sent_at: float) -> None:
        self._asking = None
        if quorum is None and not cause:
            assert self.standing.quorum_id is not None
            self.standing.go_on(self.standing.quorum_id, sent_at)
            if not self.stands(member.step):
                self._ask_lighthouse(asks)
                return
            quorum = self._quorum
        elif quorum is not None:
            self._invariants.named(quorum, self.replica_id)
            self._quorum = quorum
            self._views.clear()
            mine = (m.seen_step for m in quorum.participants if m.replica_id == self.replica_id)
            self._seen_step = max(self._seen_step, *mine, *(m.step for m in quorum.participants))
            rank = quorum.replica_ids.index(self.replica_id)
            grant = Grant(quorum.quorum_id, rank, len(quorum.participants), quorum.fenced, quorum.stands)
            self.standing.entered(grant, max(m.step for m in quorum.participants), sent_at)
        self._answer(asks, quorum, cause)

    def _answer(self, asks: list[Ask], quorum: Quorum | None, cause: str) -> None:
        self._asking = None
        for ask in asks:
            if quorum is None:
                ask.answer(None, RuntimeError(cause))
                continue
            try:
                view = self._assign(quorum, self.replica_id, ask.rank, self._settings.init_sync)
            except AssignmentError as e:
                ask.answer(None, e)
            else:
                ask.answer(view, None)

    def stands(self, step: int) -> bool:
        """Whether the group begins this step without asking."""
        start = self.standing.start(step, self.process.time)
        if not start.stands:
            return False
        self.process.world.point("standing step", self.process.name)
        assert self._quorum is not None
        if len(self._quorum.participants) == 1:
            self.process.world.seen["lone standing step"] += 1
        if self._quorum.participants[0].step <= 0:  # whoever had to heal at step 0 has
            members = tuple(replace(m, step=step) for m in self._quorum.participants)
            self._quorum = replace(self._quorum, participants=members)
            self._views.clear()
        return True

    def view(self, rank: int) -> View:
        """A rank's view of the quorum that stands."""
        view = self._views.get(rank)
        if view is None:
            assert self._quorum is not None
            view = self._assign(self._quorum, self.replica_id, rank, self._settings.init_sync)
            self._views[rank] = view
        return view

    # ------------------------------------------------------------------ vote

    def cast(self, rank: int, step: int, commit: bool, answer: Callable[[bool, str, bool], None]) -> None:
        """A rank votes on a step."""
        if self._dead_ranks:
            answer(False, f"no commit in this group: {next(iter(self._dead_ranks.values()))}", False)
            return
        self._ballots[rank] = answer
        self._decided(self._vote.vote(rank, step, commit), step)

    def uncast(self, rank: int, step: int, cause: str) -> None:
        """The rank that voted no longer waits."""
        if self._ballots.pop(rank, None) is not None:
            self._decided(self._vote.leave(rank, cause), step)
            if self._verdict is not None:  # all had voted: it was the lease that was waited for
                self._verdict = None
                self._tell_decision(tuple(self._ballots), False, cause, step)

    def _decided(self, decision: Decision, step: int) -> None:
        if decision.decided is None:
            return
        if decision.decided:
            may = self.standing.commit(self.process.time)
            if may is MayCommit.WAIT:
                self.process.world.point("waits for its lease", self.process.name)
                self._verdict = decision, step
                self.link.beat_now()
                return
            if may is MayCommit.NO:
                self._tell_decision(decision.answer, False, "the lease has run out, and the quorum is over", step)
                return
        self._tell_decision(decision.answer, decision.decided, decision.cause or "", step)

    def _look_at_lease(self) -> None:
        """A vote that waits for the lease is looked at again."""
        if self._verdict is None or self.standing.commit(self.process.time) is MayCommit.WAIT:
            return
        (decision, step), self._verdict = self._verdict, None
        self._decided(decision, step)

    def _tell_decision(self, ranks: tuple[int, ...], commit: bool, cause: str, step: int) -> None:
        self.standing.ended(step, commit)
        stands = self._settings.ranks > 1 and commit and self.stands(step + 1)
        for answer in [self._ballots.pop(rank) for rank in ranks if rank in self._ballots]:
            answer(commit, cause, stands)

    # ------------------------------------------------- what is told and heard

    def hello(self) -> tuple[Any, ...]:
        return "hello", self.replica_id, self._asked, self.standing.announcement()

    def welcomed(self, message: tuple[Any, ...], sent_at: float) -> None:
        _, lease, heartbeat_timeout, quorum_id, _ = message
        self.standing.welcomed(lease, heartbeat_timeout, quorum_id, sent_at)
        self._look_at_lease()

    def beat(self) -> int:
        return self.standing.beat(self.process.time)

    def told(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "beaten":
            self.standing.beat_answered(message[1], message[2])
            self._look_at_lease()
        elif kind == "standing":
            self._standing(message[1])
        elif kind == "notice":
            notice: Notice = message[1]
            self.standing.notice(message[2], notice.quorum_id, str(notice))
            self._tell(notice)
            self._look_at_lease()
        elif kind == "lost":
            self.standing.lost()
            if self._asking is not None:
                self._wait_for_session(self._attempt)
        elif kind == "left" and self._left is not None:
            self._left()

    def _standing(self, message: Prepare | Decide | Over) -> None:
        if isinstance(message, Over):
            if self.standing.over(message):
                self._tell(Notice(self.replica_id, message.cause, message.quorum_id, lives=True))
                self._look_at_lease()
            return
        ack = self.standing.prepare(message) if isinstance(message, Prepare) else self.standing.decide(message)
        if ack is not None:
            self.link.say(("ack", ack.change, ack.step))
            self.process.world.point("ack", self.process.name)

    def drain(self) -> None:
        """Asks for the step at which this group can go."""
        self.link.say(("drain",))

    def _tell(self, notice: Notice) -> None:
        for trainer in self.trainers:
            if trainer.process is self.process:
                trainer.hear(notice)
            else:
                self.process.world.to(trainer.process, 0.0005, trainer.hear, notice)

    def leave(self, reason: str, step: int, done: Callable[[], None]) -> None:
        """Says to everybody that this group goes, and calls ``done`` when they know or after a second."""
        self._left = done
        self.link.say(("leave", reason, step))
        self.process.after(1.0 if self.link.stands else 0.0, done)

    def rank_died(self, rank: int, cause: str) -> None:
        """A rank's process has ended."""
        text = f"rank {rank} of this group is no longer there: {cause}"
        self.link.say(("report", self.replica_id, text))
        self._dead_ranks[rank] = text
        waiting = self._gather.values()
        if waiting:
            self._gather.fail(text)
        ballots, self._ballots = self._ballots, {}
        for other in ballots:
            self._vote.leave(other, text)
        self._verdict = None
        self.standing.ended(-1, False)
        if self._asking is not None:
            waiting += self._asking[0]
            self._asking = None
            self.link.withdraw()
        for ask in waiting:
            ask.answer(None, RuntimeError(f"no quorum for this group: {text}"))
        for answer in ballots.values():
            answer(False, text, False)
        self._tell(Notice(self.replica_id, text, ANY_QUORUM))
