"""The plan of a fetch: nothing twice, nothing forgotten, and an end that the slowest does not dictate."""

from __future__ import annotations

import contextlib
import heapq
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from torchft.core.transfer_plan import MAX_BAD, MAX_RUN, SHORT, SLOW_RUN, Hopeless, TakeOver, TransferPlan, Work

LENGTH = 1000
"""Bytes of a chunk."""


class AnyOrder(RuleBasedStateMachine):
    """Workers come, work, fail and go in any order; a model of sets says where each chunk must be."""

    @initialize(lengths=st.lists(st.integers(1, LENGTH), max_size=100), kept=st.sets(st.integers(0, 99)))
    def begin(self, lengths: list[int], kept: set[int]) -> None:
        self.done = {i for i in kept if i < len(lengths)}
        self.plan = TransferPlan(lengths, self.done)
        self.received: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}
        self.source: dict[int, int] = {}
        self.gave: set[int] = set()
        self.ending: set[int] = set()
        self.now = 0.0
        self.names = 0

    def missing(self) -> set[int]:
        return set(range(self.plan.count)) - self.done - {i for h in self.held.values() for i in h}

    @rule(source=st.integers(0, 2))
    def come(self, source: int) -> None:
        self.names += 1
        self.plan.add(self.names, source)
        self.held[self.names], self.source[self.names], self.received[self.names] = [], source, 0

    @precondition(lambda self: self.held)
    @rule(data=st.data(), passed=st.floats(0.0, 1.0))
    def hear(self, data: st.DataObject, passed: float) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        self.now += passed
        self.received[worker] += data.draw(st.integers(0, LENGTH))
        self.plan.heard(worker, self.received[worker], self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), passed=st.floats(0.0, 3.0))
    def ask(self, data: st.DataObject, passed: float) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        self.now += passed
        if self.held[worker]:
            with pytest.raises(ValueError, match="holds work"):
                self.plan.ask(worker, self.now)
            return
        missing = self.missing()
        answer = self.plan.ask(worker, self.now)
        if isinstance(answer, Work):
            chunks = list(range(answer.first, answer.stop))
            assert chunks
            assert len(chunks) <= (MAX_RUN if worker in self.gave else 1), "nobody knows yet how fast it is"
            assert set(chunks) <= missing, "given to two, or given though done"
            self.held[worker] = chunks
        elif isinstance(answer, TakeOver):
            assert answer.victim != worker
            assert self.held[answer.victim], "there is nothing to take over"
            assert answer.victim not in self.ending, "taken over from twice"
            self.ending.add(answer.victim)

    def _first_of(self, data: st.DataObject) -> tuple[int, int] | None:
        busy = sorted(w for w, h in self.held.items() if h)
        if not busy:
            return None
        worker = data.draw(st.sampled_from(busy))
        self.now += data.draw(st.floats(0.0, 1.0))
        self.plan.arrived(worker, self.now)
        self.gave.add(worker)
        return worker, self.held[worker].pop(0)

    @rule(data=st.data())
    def verify(self, data: st.DataObject) -> None:
        if (one := self._first_of(data)) is not None:
            self.plan.verified(*one)
            self.done.add(one[1])

    @rule(data=st.data())
    def find_bad(self, data: st.DataObject) -> None:
        if (one := self._first_of(data)) is not None:
            before = self.plan.bad_from(self.source[one[0]])
            with contextlib.suppress(Hopeless):
                self.plan.bad(*one)
            assert self.plan.bad_from(self.source[one[0]]) == before + 1
            assert self.plan.distrusted(self.source[one[0]]) == (before + 1 >= MAX_BAD)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        self.plan.remove(worker)
        del self.held[worker]
        self.ending.discard(worker)

    @rule(indices=st.sets(st.integers(0, 45), max_size=5))
    def revoke(self, indices: set[int]) -> None:
        self.plan.revoke(indices)
        self.done -= indices

    @invariant()
    def each_chunk_is_in_one_place(self) -> None:
        if not hasattr(self, "plan"):
            return
        assert self.plan.done == self.done
        assert self.plan.finished == (len(self.done) == self.plan.count)
        assert self.plan.remaining == self.plan.count - len(self.done)
        free = {i for first, stop in self.plan._free for i in range(first, stop)}
        assert free == self.missing()

    def teardown(self) -> None:
        """Whatever has happened: one honest worker that stays gets the rest."""
        if not hasattr(self, "plan"):
            return
        for worker in list(self.held):
            self.plan.remove(worker)
        self.plan.add(0, 7)
        while not self.plan.finished:
            work = self.plan.ask(0, self.now)
            assert isinstance(work, Work), "it waits for nobody"
            for index in range(work.first, work.stop):
                self.plan.arrived(0, self.now)
                self.plan.verified(0, index)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def simulate(count: int, paces: list[float], stops: dict[int, float] | None = None, until: float = 1e6) -> float:
    """Seconds that workers, each of a source of its own, take for all chunks. ``stops``: when one hangs."""
    stops = stops or {}
    plan = TransferPlan([LENGTH] * count)
    for worker in range(len(paces)):
        plan.add(worker, worker)
    events: list[tuple[float, int, int]] = [(0.0, w, -1) for w in range(len(paces))]
    held: dict[int, list[int]] = {w: [] for w in range(len(paces))}
    whole = [(0, 0.0)] * len(paces)  # chunks, and when the one after them began
    heapq.heapify(events)
    while events:
        now, worker, index = heapq.heappop(events)
        assert now < until, "it hangs"
        if worker not in held or (index >= 0 and index not in held[worker]):
            continue
        if index >= 0:
            held[worker].remove(index)
            whole[worker] = whole[worker][0] + 1, now
            plan.arrived(worker, now)
            plan.verified(worker, index)
        if plan.finished:
            return now
        if not held[worker]:
            for other in (w for w, chunks in held.items() if chunks):
                chunks, since = whole[other]
                part = (min(now, stops.get(other, now)) - since) / paces[other]
                plan.heard(other, int(LENGTH * (chunks + min(1.0, max(0.0, part)))), now)
            answer = plan.ask(worker, now)
            if isinstance(answer, TakeOver):
                plan.remove(answer.victim)
                del held[answer.victim]
                answer = plan.ask(worker, now)
            if isinstance(answer, Work):
                held[worker] = list(range(answer.first, answer.stop))
                whole[worker] = whole[worker][0], now
            else:
                heapq.heappush(events, (now + 0.01, worker, -1))
        if held[worker] and now + paces[worker] < stops.get(worker, until):
            heapq.heappush(events, (now + paces[worker], worker, held[worker][0]))
    raise AssertionError("nobody works any more")


@pytest.mark.parametrize(
    ("pace", "run"), [(SHORT, SLOW_RUN), (SHORT / 20.5, 20), (SHORT / 1000, MAX_RUN)], ids=["slow", "faster", "fast"]
)
def test_who_is_fast_gets_longer_runs(pace: float, run: int) -> None:
    plan = TransferPlan([LENGTH] * 1000)
    plan.add(0, 0)
    assert plan.ask(0, 0.0) == Work(0, 1)
    plan.arrived(0, pace)
    plan.verified(0, 0)
    assert plan.ask(0, pace) == Work(1, 1 + run)


def test_who_is_fast_leaves_others_their_share() -> None:
    plan = TransferPlan([LENGTH] * 41)
    for worker in range(2):
        plan.add(worker, worker)
    assert plan.ask(0, 0.0) == Work(0, 1)
    plan.arrived(0, SHORT / 1000)
    plan.verified(0, 0)
    assert plan.ask(0, SHORT / 1000) == Work(1, 11)


@settings(max_examples=30, deadline=None)
@given(st.integers(50, 200), st.lists(st.floats(0.002, 0.05), min_size=1, max_size=8))
def test_equal_or_not_the_sources_end_together(count: int, paces: list[float]) -> None:
    ideal = count / sum(1 / p for p in paces)
    assert simulate(count, paces) <= 1.25 * ideal + 2 * max(paces) + 0.2


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 100), st.floats(0.002, 0.02), st.floats(1.0, 100.0))
def test_a_very_slow_source_does_not_dictate_the_end(count: int, fast: float, slow: float) -> None:
    assert simulate(count, [fast, slow]) <= count * fast + 0.5 + 4 * SLOW_RUN * fast


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 100), st.floats(0.002, 0.02), st.floats(0.0, 0.5))
def test_a_source_that_hangs_is_taken_over_from(count: int, pace: float, when: float) -> None:
    assert simulate(count, [pace, pace], {1: when}) <= count * pace + 0.5 + 4 * SLOW_RUN * pace


class SlowWay:
    """Sources behind links of so many bytes a second, which the two workers of each share.

    Args:
        lengths: of the chunks.
        links: bytes a second of each.
        second: seconds after which the sources beyond the first are asked as well.
        changes: of a source: when, and what its speed is multiplied by from then on.
    """

    TICK = 0.05

    def __init__(
        self,
        lengths: list[int],
        links: list[float],
        second: float = 0.4,
        changes: dict[int, tuple[float, float]] | None = None,
    ) -> None:
        self.lengths, self.links, self.second = lengths, links, second
        self.changes = changes or {}
        self.plan = TransferPlan(lengths)
        self.now = 0.0
        self.source: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}
        self.came: dict[int, float] = {}
        self.whole: dict[int, int] = {}
        self.taken_over: list[tuple[float, int]] = []
        """When, and from which source."""

    def run(self, limit: float) -> float:
        """Seconds until all is there."""
        while not self.plan.finished:
            assert self.now < limit, f"{self.plan.remaining} of {self.plan.count} chunks are missing"
            self._come()
            self._ask()
            self.now += self.TICK
            self._carry()
        return self.now

    def _come(self) -> None:
        for source in range(len(self.links)):
            if (self.now >= self.second or not source) and source not in self.source.values():
                for worker in (2 * source, 2 * source + 1):
                    self.plan.add(worker, source)
                    self.source[worker], self.held[worker] = source, []
                    self.came[worker], self.whole[worker] = 0.0, 0

    def _ask(self) -> None:
        for worker in [w for w, chunks in self.held.items() if not chunks]:
            for other in self.held:
                self.plan.heard(other, int(self.came[other]), self.now)
            answer = self.plan.ask(worker, self.now)
            if isinstance(answer, Work):
                self.held[worker] = list(range(answer.first, answer.stop))
            elif isinstance(answer, TakeOver):
                self.taken_over.append((self.now, self.source[answer.victim]))
                self.plan.remove(answer.victim)
                del self.held[answer.victim]

    def _carry(self) -> None:
        for source, rate in enumerate(self.links):
            busy = [w for w, chunks in self.held.items() if chunks and self.source[w] == source]
            when, factor = self.changes.get(source, (math.inf, 1.0))
            for worker in busy:
                self.came[worker] += rate * self.TICK / len(busy) * (factor if self.now >= when else 1.0)
                index = self.held[worker][0]
                if self.came[worker] >= self.whole[worker] + self.lengths[index]:
                    self.whole[worker] += self.lengths[index]
                    self.came[worker] = self.whole[worker]
                    self.held[worker].pop(0)
                    self.plan.arrived(worker, self.now)
                    self.plan.verified(worker, index)


@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("seconds", [0.8, 8.0])
def test_of_few_chunks_over_equal_slow_ways_none_is_taken_over(count: int, sources: int, seconds: float) -> None:
    way = SlowWay([LENGTH] * count + [1], [LENGTH / seconds] * sources)
    way.run(count * seconds + 1.0)
    assert not way.taken_over, "what had come of it came twice"


@pytest.mark.parametrize("seconds", [4.0, 20.0])
@pytest.mark.parametrize("rates", [[1], [1, 1], [1, 1, 1], [1] * 8, [1, 4], [4, 1], [1, 1, 4], [4, 2, 1, 1]])
def test_sixteen_chunks_come_about_as_fast_as_all_slow_ways_together(rates: list[float], seconds: float) -> None:
    way = SlowWay([LENGTH] * 16, [16 * LENGTH / seconds * r / sum(rates) for r in rates])
    way.run(1.4 * seconds + way.second)


@pytest.mark.parametrize(("stop", "soon"), [(0.0, 1.0), (0.3, 1.0), (0.8, 4.0), (1.6, 5.5)])
def test_a_source_that_stops_in_its_first_chunk_is_taken_over_from(stop: float, soon: float) -> None:
    way = SlowWay([LENGTH] * 2, [LENGTH] * 2, changes={0: (stop, 0.0)})
    way.run(10.0)
    when, source = way.taken_over[0]
    assert source == 0
    assert stop < when <= soon + way.TICK


def test_a_source_that_becomes_slow_in_the_middle_of_a_chunk_is_taken_over_from() -> None:
    way = SlowWay([LENGTH] * 6, [LENGTH] * 2, changes={0: (2.5, 0.01)})
    way.run(9.0)
    assert {source for _, source in way.taken_over} == {0}


def test_a_bad_chunk_is_asked_of_another_source() -> None:
    plan = TransferPlan([LENGTH] * 2)
    plan.add(1, source=1)
    plan.add(2, source=2)
    assert plan.ask(1, 0.0) == Work(0, 1)
    plan.arrived(1, 0.1)
    plan.bad(1, 0)
    assert plan.ask(1, 0.1) == Work(1, 2), "chunk 0 is not asked of source 1 again"
    assert plan.ask(2, 0.1) == Work(0, 1)


def test_a_bad_chunk_is_asked_of_the_only_source_again_and_then_given_up() -> None:
    plan = TransferPlan([LENGTH])
    plan.add(1, source=1)
    for _ in range(2):
        assert plan.ask(1, 0.0) == Work(0, 1)
        plan.bad(1, 0)
    assert plan.ask(1, 0.0) == Work(0, 1)
    with pytest.raises(Hopeless, match="chunk 0"):
        plan.bad(1, 0)


def test_kept_chunks_are_not_asked_for_until_they_are_revoked() -> None:
    plan = TransferPlan([LENGTH] * 4, [0, 1, 2])
    plan.add(1, source=1)
    assert plan.ask(1, 0.0) == Work(3, 4)
    plan.verified(1, 3)
    assert plan.finished
    plan.revoke([1])
    assert not plan.finished
    assert plan.ask(1, 0.0) == Work(1, 2)
