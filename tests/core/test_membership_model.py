"""``Membership`` against a naive model: the rules of the per-step quorum (docs/protocol.md, part 1: *Lighthouse*)
written down once more, each time from nothing but the list of the waiting and the times of the last signs of life.

Times are whole milliseconds, so that no comparison depends on rounding.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.core.membership import Member, Membership, Options, Outcome

IDS = "abcde"
HEARTBEAT_TIMEOUT = 50
JOIN_TIMEOUT = 20

QUIET = ("heartbeat", "attach", "beat")
"""Events that can only make others wait: nothing is decided."""

Event = tuple[str, Member, int]
"""What happens, to whom, and how many ms after the last event."""


@dataclass
class Model:
    """The lighthouse, naively."""

    min_replicas: int
    last_sign: dict[str, int] = field(default_factory=dict)
    asked: dict[str, Member] = field(default_factory=dict)
    previous: list[str] | None = None
    quorum_id: int = 0
    announced_dead: list[str] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    buried: set[str] = field(default_factory=set)
    broken: bool = False
    asked_at: dict[str, int] = field(default_factory=dict)
    possible_since: int | None = None
    at: dict[str, int] = field(default_factory=dict)
    """The steps of those that live, as they said."""
    seen: dict[str, int] = field(default_factory=dict)
    furthest: int = 0

    def happen(self, what: str, member: Member, now: int) -> None:
        rid = member.replica_id
        self.announced_dead = []
        if what in ("heartbeat", "request") or (what == "beat" and rid in self.last_sign):
            self.last_sign[rid] = now
        if what == "attach":
            self.sessions.add(rid)
            if rid in self.last_sign or rid not in self.buried:
                self.last_sign[rid] = now
        if what == "detach":
            self.sessions.discard(rid)
        if what == "request":
            self.at[rid] = member.step
            self.furthest = max(self.furthest, member.step)
            self.seen[rid] = max([self.seen.get(rid, 0), *self.at.values()])
            self.asked[rid] = replace(member, seen_step=self.seen[rid])
            self.asked_at[rid] = now
            self.buried.discard(rid)
        if what in ("withdraw", "failed"):
            self.asked.pop(rid, None)
        if what == "failed" and self.last_sign.pop(rid, None) is not None:
            self.announced_dead.append(rid)
        if what not in QUIET:
            silent = [r for r, at in self.last_sign.items() if now > at + HEARTBEAT_TIMEOUT]
            for r in sorted(set(silent) - self.sessions):
                self.announced_dead.append(r)
                del self.last_sign[r]
            before = set(self.previous or [])
            in_vain = [self.asked_at[r] for r in before if r in self.asked and self.asked[r].timed_out]
            if in_vain and now >= min(in_vain) + HEARTBEAT_TIMEOUT:
                for r in self.previous or []:
                    if r in self.last_sign and r not in self.asked:
                        self.announced_dead.append(r)
                        del self.last_sign[r]
        self.buried.update(self.announced_dead)
        for r in self.announced_dead:
            self.at.pop(r, None)
            self.seen.pop(r, None)
        self.broken = self.broken or bool(set(self.announced_dead) & set(self.previous or []))

    def form(self, now: int) -> tuple[int, list[Member]] | None:
        """The quorum that has to form now, if one has to."""
        healthy = list(self.last_sign)
        h = sorted(r for r in self.asked if r in healthy)
        asked = [self.asked[r] for r in h]
        candidates = h
        if self.previous is not None and any(m.shrink_only for m in asked):
            candidates = [r for r in h if r in self.previous]
        no_split_brain = len(h) > len(healthy) - len(h)
        fast = self.previous is not None and all(r in h for r in self.previous)
        newest = max([0, *(self.asked[r].step for r in candidates)])
        ahead = [r for r, step in self.at.items() if r not in candidates and step > 0]
        missed = newest == 0 and bool(ahead)
        if not h or len(candidates) < self.min_replicas or missed or not (fast or no_split_brain):
            self.possible_since = None
            return None
        if self.possible_since is None:
            self.possible_since = now
        all_joined = all(r in h for r in healthy)
        if not (fast or all_joined or now >= self.possible_since + JOIN_TIMEOUT):
            return None
        self.possible_since = None
        members = [self.asked.pop(r) for r in candidates]
        if candidates != self.previous or self.broken or any(m.commit_failures > 0 for m in members):
            self.quorum_id += 1
        self.broken = False
        self.previous = candidates
        return self.quorum_id, members


members = st.builds(
    Member,
    replica_id=st.sampled_from(IDS),
    step=st.integers(-1, 3),
    shrink_only=st.sampled_from([False] * 7 + [True]),
    commit_failures=st.sampled_from([0] * 7 + [1, 2]),
    timed_out=st.sampled_from([False] * 3 + [True]),
)
events = st.tuples(
    st.sampled_from(
        ["request"] * 6 + ["heartbeat"] * 3 + ["tick", "withdraw", "failed", "attach", "attach", "beat", "detach"]
    ),
    members,
    st.sampled_from([0, 1, 1, 5, 10, 19, 20, 21, 30, 50, 51]),
)


def carry_out(machine: Membership, event: Event, now: int) -> Outcome:
    what, member, _ = event
    if what == "request":
        return machine.request(member, now)
    if what == "tick":
        return machine.tick(now)
    if what == "failed":
        return machine.failed(member.replica_id, "told so", now)
    if what == "attach":
        return machine.attach(member.replica_id, True, now)
    outcome: Outcome = getattr(machine, what)(member.replica_id, now)
    return outcome


@settings(max_examples=400)
@given(min_replicas=st.integers(1, 3), script=st.lists(events, min_size=5, max_size=60))
def test_membership_decides_as_the_protocol_says(min_replicas: int, script: list[Event]) -> None:
    machine = Membership(Options(min_replicas, JOIN_TIMEOUT, HEARTBEAT_TIMEOUT))
    model = Model(min_replicas)
    now = 0
    for event in script:
        now += event[2]
        outcome = carry_out(machine, event, now)
        model.happen(event[0], event[1], now)
        expected = model.form(now) if event[0] not in QUIET else None
        formed = outcome.quorum and (outcome.quorum.quorum_id, list(outcome.quorum.participants))
        assert formed == expected
        if outcome.quorum is not None:
            trained = any(m.step > 0 for m in outcome.quorum.participants)
            assert outcome.quorum.former_step == (0 if trained else model.furthest)
        assert [d.replica_id for d in outcome.dead] == model.announced_dead
        assert machine.healthy() == tuple(sorted(model.last_sign))
        assert machine.waiting() == tuple(model.asked[r] for r in sorted(model.asked))


@settings(max_examples=200)
@given(min_replicas=st.integers(1, 3), script=st.lists(events, min_size=20, max_size=60))
def test_quorum_ids_and_members_keep_their_promises(min_replicas: int, script: list[Event]) -> None:
    machine = Membership(Options(min_replicas, JOIN_TIMEOUT, HEARTBEAT_TIMEOUT), quorum_id=7)
    now, newest = 0, 7
    meaning: dict[int, tuple[str, ...]] = {}
    for event in script:
        now += event[2]
        before = {m.replica_id for m in machine.waiting()} | ({event[1].replica_id} if event[0] == "request" else set())
        quorum = carry_out(machine, event, now).quorum
        if quorum is None:
            continue
        ids = quorum.replica_ids
        assert quorum.quorum_id in (newest, newest + 1), "ids go up one by one and never back"
        assert meaning.setdefault(quorum.quorum_id, ids) == ids, "an id means one membership"
        assert newest > 7 or quorum.quorum_id > 7, "an id of an earlier life is never used again"
        newest = quorum.quorum_id
        assert list(ids) == sorted(set(ids))
        assert min_replicas <= len(ids)
        assert set(ids) <= before & set(machine.healthy()), "only the healthy who wait are members"
        assert not set(ids) & {m.replica_id for m in machine.waiting()}, "who is answered waits no more"


@settings(max_examples=100)
@given(script=st.lists(events, min_size=5, max_size=40))
def test_reason_is_told_exactly_when_it_changes(script: list[Event]) -> None:
    machine = Membership(Options(2, JOIN_TIMEOUT, HEARTBEAT_TIMEOUT))
    now, told = 0, ""
    for event in script:
        now += event[2]
        outcome = carry_out(machine, event, now)
        assert outcome.status is None or outcome.status != told
        told = outcome.status or told
        assert machine.status == told


@settings(max_examples=200)
@given(min_replicas=st.integers(1, 3), script=st.lists(events, min_size=5, max_size=60))
def test_before_it_is_due_time_alone_changes_nothing(min_replicas: int, script: list[Event]) -> None:
    machine = Membership(Options(min_replicas, JOIN_TIMEOUT, HEARTBEAT_TIMEOUT))
    now = 0
    for event in script:
        now += event[2]
        carry_out(machine, event, now)
        machine.tick(now)  # what a heartbeat changed shows now
        due = machine.due()
        later = deepcopy(machine)
        quiet = later.tick(now + 1000 if due is None else max(now, due - 1))
        assert (quiet.quorum, quiet.dead) == (None, ())
        assert (later.healthy(), later.waiting()) == (machine.healthy(), machine.waiting())
