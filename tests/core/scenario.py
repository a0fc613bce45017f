"""Scenario files: events for the machines of ``torchft.core`` and what each of them answers, in one text.

A file is a list of blocks. A block is some lines of events, a line ``----``, the answers, and an empty line; lines
that begin with ``#`` are for the reader and stay. :func:`rerun` carries out the events and returns the whole text
with the answers as they are now: a scenario passes when that changes nothing.

Events (times in ms; ``name=value`` pairs are optional)::

    options min_replicas=2 join_timeout=0.1 heartbeat_timeout=5    a new membership; both times in seconds
    heartbeat A | withdraw A | fail A cause...
    request A step=3 commit_failures=1 shrink_only=true timed_out=true attempt=9 lineage=5
    attach A active=true | beat A | detach A | left A 7 cause... | spare      sessions; 7: the step where it left
    tick 500      time passes and the machine is told         after 500     time passes, nobody says so
    state         who is healthy, who waits
    quorum 7 A=3 B=3.5 C=-1    a quorum of these members at these steps (and lineages), for the next line (or the one
                  formed last)
    assign A group_rank=0 init_sync=true      its view, in full
    group 3       a new commit vote of three ranks: vote 0 step=5 yes | leave 1 cause... | reset
    gather 3      a new gathering of three ranks: come 0 VALUE | leave 1 cause... | end cause... | reset

and those of standing quorums, which ``tests/core/standing_scenario.py`` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.core.standing_scenario import Standing
from torchft.core.assignment import AssignmentError, assign
from torchft.core.commit import CommitVote, Decision, Gather, Gathered
from torchft.core.membership import Member, Membership, Options, Outcome, Quorum

__all__ = ["Runner", "rerun"]


@dataclass
class Event:
    """One line: its words after the verb, split into plain ones and ``name=value`` pairs."""

    words: list[str]
    options: dict[str, str]
    rest: str
    """All after the first word."""


class Runner:
    """The machines of one file."""

    def __init__(self) -> None:
        self.now = 0
        self.membership: Membership | None = None
        self.quorum: Quorum | None = None
        self.round: CommitVote | Gather[str] | None = None
        self._verbs: dict[str, Callable[[Event], list[str]]] = {
            "options": self._options,
            "heartbeat": lambda e: self.told(self._m.heartbeat(e.words[0], self._s)),
            "request": lambda e: self.told(self._m.request(_member(e.words[0], e.options), self._s)),
            "withdraw": lambda e: self.told(self._m.withdraw(e.words[0], self._s)),
            "fail": lambda e: self.told(self._m.failed(e.words[0], e.rest, self._s)),
            "attach": lambda e: self.told(self._m.attach(e.words[0], e.options.get("active") == "true", self._s)),
            "beat": lambda e: self.told(self._m.beat(e.words[0], self._s)),
            "detach": lambda e: self.told(self._m.detach(e.words[0], self._s)),
            "left": lambda e: self.told(self._m.failed(e.words[0], e.rest.partition(" ")[2], self._s, int(e.words[1]))),
            "spare": lambda e: self.told(self._m.spare(self._s)),
            "tick": self._tick,
            "after": self._after,
            "state": self._state,
            "quorum": self._given_quorum,
            "assign": self._assign,
            "group": self._group,
            "gather": self._gather,
            "vote": self._vote,
            "come": self._come,
            "leave": self._leave,
            "end": self.end,
            "reset": self._reset,
        }
        self._verbs |= Standing(self).verbs  # its "end" hands those of a gathering back

    def run(self, line: str) -> list[str]:
        """The answers to one event."""
        verb, *rest = line.split()
        words = [word for word in rest if "=" not in word]
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        event = Event(words, options, " ".join(rest[1:]))
        try:
            return self._verbs[verb](event) or ["-"]
        except (ValueError, AssignmentError) as e:
            return [f"{type(e).__name__}: {e}"]

    # --------------------------------------------------------- membership

    @property
    def _m(self) -> Membership:
        assert self.membership is not None, "the file has no 'options' line before this one"
        return self.membership

    @property
    def _s(self) -> float:
        return self.now / 1000

    def _options(self, e: Event) -> list[str]:
        options = Options(
            min_replicas=int(e.options.get("min_replicas", "1")),
            join_timeout=float(e.options.get("join_timeout", "0.1")),
            heartbeat_timeout=float(e.options.get("heartbeat_timeout", "5")),
        )
        self.membership = Membership(options, int(e.options.get("quorum_id", "0")))
        return []

    def _tick(self, e: Event) -> list[str]:
        self.now += int(e.words[0])
        return self.told(self._m.tick(self._s))

    def _after(self, e: Event) -> list[str]:
        self.now += int(e.words[0])
        return []

    def _state(self, e: Event) -> list[str]:
        waiting = " ".join(m.replica_id for m in self._m.waiting()) or "nobody"
        return [f"healthy: {' '.join(self._m.healthy()) or 'nobody'}", f"waiting: {waiting}"]

    def told(self, outcome: Outcome) -> list[str]:
        lines = [
            f"dead {d.replica_id}, quorums up to {d.quorum_id}{f', before step {d.step}' if d.step else ''}: {d.cause}"
            for d in outcome.dead
        ]
        if outcome.again is not None:
            lines.append(f"again quorum {outcome.again.quorum_id}")
        if outcome.broken is not None:
            lines.append(f"{outcome.broken.replica_id} breaks quorum {outcome.broken.quorum_id}")
        if outcome.quorum is not None:
            self.quorum = outcome.quorum
            members = " ".join(f"{m.replica_id}={m.step}" for m in outcome.quorum.participants)
            former = f", a former job was at {outcome.quorum.former_step}" if outcome.quorum.former_step else ""
            lines.append(f"quorum {outcome.quorum.quorum_id}: {members}{former}")
        if outcome.status is not None:
            lines.append(f"status: {outcome.status}")
        return lines

    # --------------------------------------------------------- assignment

    def _given_quorum(self, e: Event) -> list[str]:
        members = [
            _member(rid, dict(zip(("step", "lineage"), state.split("."), strict=False)))
            for rid, state in e.options.items()
        ]
        self.quorum = Quorum(int(e.words[0]), tuple(members))
        return []

    def _assign(self, e: Event) -> list[str]:
        assert self.quorum is not None, "the file has no quorum before this line"
        init_sync = e.options.get("init_sync", "true") == "true"
        view = assign(self.quorum, e.words[0], int(e.options.get("group_rank", "0")), init_sync)
        source = "-"
        if view.recover_src_replica_rank is not None:
            source = f"{view.recover_src_replica_rank} at {view.recover_src_manager_address}"
        return [
            f"quorum {view.quorum_id} rank {view.replica_rank} of {view.replica_world_size}: "
            f"{' '.join(view.replica_ids)}",
            f"max step {view.max_step}, rank {view.max_replica_rank} of {view.max_world_size} there, "
            f"store {view.store_address}, commit failures {view.commit_failures}",
            f"heal {str(view.heal).lower()}, from {source}, serves {list(view.recover_dst_replica_ranks)}",
            *([f"lost: step {view.lost_step}, with survivors {view.lost_by_survivor}"] if view.lost_step else []),
        ]

    # -------------------------------------------------------------- votes

    def _group(self, e: Event) -> list[str]:
        self.round = CommitVote(int(e.words[0]))
        return []

    def _gather(self, e: Event) -> list[str]:
        self.round = Gather(int(e.words[0]), "quorum")
        return []

    def _vote(self, e: Event) -> list[str]:
        assert isinstance(self.round, CommitVote)
        rank, answer = e.words
        return _answers(self.round.vote(int(rank), int(e.options["step"]), {"yes": True, "no": False}[answer]))

    def _come(self, e: Event) -> list[str]:
        assert isinstance(self.round, Gather)
        return _answers(self.round.come(int(e.words[0]), e.rest))

    def _leave(self, e: Event) -> list[str]:
        assert self.round is not None
        return _answers(self.round.leave(int(e.words[0]), e.rest))

    def end(self, e: Event) -> list[str]:
        assert isinstance(self.round, Gather)
        return _answers(self.round.fail(" ".join(e.words)))

    def _reset(self, e: Event) -> list[str]:
        assert self.round is not None
        if isinstance(self.round, CommitVote):
            self.round.reset()
        else:
            self.round.clear()
        return []


def _member(replica_id: str, options: dict[str, str]) -> Member:
    return Member(
        replica_id,
        address=f"http://{replica_id}:1",
        store_address=f"{replica_id}:2",
        step=int(options.get("step", "0")),
        shrink_only=options.get("shrink_only") == "true",
        commit_failures=int(options.get("commit_failures", "0")),
        timed_out=options.get("timed_out") == "true",
        attempt=int(options.get("attempt", "0")),
        lineage=int(options.get("lineage", "0")),
        seen_step=int(options.get("seen_step", "0")),
    )


def _answers(told: Decision | Gathered[str]) -> list[str]:
    lines = []
    if told.superseded is not None:
        lines.append(f"gives up the earlier call of rank {told.superseded}")
    ranks = " ".join(map(str, told.answer))
    if isinstance(told, Decision):
        if told.decided is not None:
            lines.append(f"tell {ranks or 'nobody'}: {'yes' if told.decided else 'no'}")
        if told.cause is not None:
            lines.append(f"cause: {told.cause}")
    else:
        if told.complete is not None:
            lines.append("complete: " + ", ".join(f"{rank} {value}".strip() for rank, value in told.complete.items()))
        if told.failed is not None:
            lines.append(f"tell {ranks or 'nobody'}: failed: {told.failed}")
    return lines


def rerun(text: str) -> str:
    """The text of a scenario with the answers that its events get now."""
    runner = Runner()
    out: list[str] = []
    answers: list[str] = []
    skipping = False
    for line in text.splitlines():
        if skipping and line.strip():
            continue
        skipping = False
        if line.strip() == "----":
            out += ["----", *answers]
            answers, skipping = [], True
            continue
        out.append(line.rstrip())
        if line.strip() and not line.startswith("#"):
            answers += runner.run(line)
    if answers:
        out += ["----", *answers]
    return "\n".join(out).rstrip("\n") + "\n"
