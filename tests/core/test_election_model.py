"""Several candidates and a register, over random schedules: pauses, lost and late messages, clocks of different speed.

``World`` is the truth: the register's lease runs by the true time, each candidate has a clock of its own, and what
it sends may come late, or not at all. After every event the invariants of the module are checked.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.core.election import (
    MAX_EPOCH,
    Began,
    Candidate,
    Ended,
    EpochGuard,
    Holder,
    LeaseOptions,
    Op,
    Order,
    Register,
    first_id,
    plausible,
)

OPTIONS = LeaseOptions(lease=5.0)


@dataclass
class Lighthouse:
    candidate: Candidate
    rate: float
    paused_until: float = 0.0
    busy: bool = False
    """An order of its is under way."""
    dead: bool = False
    reigns: list[int] = field(default_factory=list)
    over: set[int] = field(default_factory=set)
    """Epochs in which it has been seen not to lead any more."""

    def clock(self, t: float) -> float:
        return 1000.0 + self.rate * t


class World:
    def __init__(self, random: Random, candidates: int, drift: float) -> None:
        self.random = random
        self.t = 0.0
        self.faults = True
        self.epoch = 0
        self.holder: Holder | None = None
        self.leases: dict[int, float] = {}
        self._numbers = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.all = [
            Lighthouse(Candidate(f"c{i}", OPTIONS), 1 + random.uniform(-drift, drift)) for i in range(candidates)
        ]
        for lighthouse in self.all:
            self.wake(lighthouse)

    # --------------------------------------------------------- the network

    def at(self, t: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (t, next(self._order), do))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.t, _, do = heapq.heappop(self._events)
            do()
            self.check()
        self.t = until

    def delay(self) -> float | None:
        """Of one message; None: lost."""
        if self.faults and self.random.random() < 0.1:
            return None
        return self.random.choice([0.001, 0.02, 0.5, 3.0]) if self.faults else 0.001

    def check(self) -> None:
        leading = []
        for lighthouse in self.all:
            leads = lighthouse.candidate.leads(lighthouse.clock(self.t)) and not lighthouse.dead
            epoch = lighthouse.candidate.epoch
            if leads:
                assert epoch not in lighthouse.over, "a reign that was over is back"
                leading.append(epoch)
            elif epoch:
                lighthouse.over.add(epoch)
        assert len(leading) <= 1, f"epochs {leading} lead at once"
        reigns = [e for lighthouse in self.all for e in lighthouse.reigns]
        assert len(set(reigns)) == len(reigns), "an epoch was ruled twice"

    # ------------------------------------------------------- the register

    def expire(self) -> None:
        self.leases = {n: until for n, until in self.leases.items() if until > self.t}
        if self.holder is not None and self.holder.lease not in self.leases:
            self.holder = None

    def carry_out(self, order: Order, name: str) -> object:
        self.expire()
        if order.op is Op.LOOK:
            return Register(self.epoch, self.holder)
        if order.op is Op.RENEW:
            granted = order.lease in self.leases
            if granted:
                self.leases[order.lease] = self.t + OPTIONS.lease
            return granted
        if order.op is Op.VACATE:
            self.leases.pop(order.lease, None)
            self.expire()
            return None
        if self.holder is not None or self.epoch != order.expected:
            return None
        lease = next(self._numbers)
        self.leases[lease] = self.t + OPTIONS.lease
        self.epoch = order.epoch
        self.holder = Holder(name, f"http://{name}:1", f"{name}:2", order.epoch, lease)
        return self.holder

    # ------------------------------------------------------ the candidates

    def act(self, lighthouse: Lighthouse, do: Callable[[], None]) -> None:
        """As soon as it is not paused."""
        if lighthouse.dead:
            return
        if self.t < lighthouse.paused_until:
            self.at(lighthouse.paused_until, lambda: self.act(lighthouse, do))
        else:
            do()

    def wake(self, lighthouse: Lighthouse) -> None:
        self.act(lighthouse, lambda: self.next(lighthouse))

    def next(self, lighthouse: Lighthouse) -> None:
        now = lighthouse.clock(self.t)
        self.heard(lighthouse, lighthouse.candidate.tick(now))
        if lighthouse.busy:
            return
        order, wait = lighthouse.candidate.next(now)
        if order is None:
            self.at(self.t + max(0.001, (wait - now) / lighthouse.rate), lambda: self.wake(lighthouse))
            return
        lighthouse.busy = True
        answered = [False]

        def end(told: Callable[[float], Began | Ended | None]) -> None:
            if not answered[0]:
                answered[0] = True
                lighthouse.busy = False
                self.heard(lighthouse, told(lighthouse.clock(self.t)))
                self.next(lighthouse)

        def arrive() -> None:
            answer = self.carry_out(order, lighthouse.candidate.name)
            back = self.delay()
            if back is not None:
                self.at(
                    self.t + back,
                    lambda: self.act(lighthouse, lambda: end(lambda n: self.tell(order, answer, now, n, lighthouse))),
                )

        there = self.delay()
        if there is not None:
            self.at(self.t + there, arrive)
        patience = OPTIONS.patience / lighthouse.rate
        self.at(self.t + patience, lambda: self.act(lighthouse, lambda: end(lighthouse.candidate.unreachable)))

    def tell(
        self, order: Order, answer: object, sent_at: float, now: float, lighthouse: Lighthouse
    ) -> Began | Ended | None:
        candidate = lighthouse.candidate
        if order.op is Op.LOOK:
            assert isinstance(answer, Register)
            candidate.looked(answer, now)
            return None
        if order.op is Op.RENEW:
            return candidate.renewed(bool(answer), sent_at, now)
        if order.op is Op.VACATE:
            candidate.vacated(now)
            return None
        assert answer is None or isinstance(answer, Holder)
        return candidate.campaigned(answer, sent_at, now)

    def heard(self, lighthouse: Lighthouse, change: Began | Ended | None) -> None:
        if isinstance(change, Began):
            lighthouse.reigns.append(change.epoch)

    def fault(self) -> None:
        lighthouse = self.random.choice(self.all)
        what = self.random.choice(["pause", "pause", "told", "proven dead", "resign"])
        if what == "pause":
            lighthouse.paused_until = self.t + self.random.choice([0.1, 2.0, 4.9, 20.0])
        elif what == "told" and self.t >= lighthouse.paused_until:
            highest = max([self.epoch, *(x.candidate.highest for x in self.all)])
            self.heard(lighthouse, lighthouse.candidate.told(highest, lighthouse.clock(self.t)))
        elif what == "proven dead" and self.holder is not None:
            holder = self.holder
            if any(x.candidate.name == holder.name and x.dead for x in self.all):
                lighthouse.candidate.proven_dead(holder, lighthouse.clock(self.t))
        elif what == "resign" and self.t >= lighthouse.paused_until:
            self.heard(lighthouse, lighthouse.candidate.resign(lighthouse.clock(self.t)))
        self.check()


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), candidates=st.integers(1, 4), crash=st.booleans())
def test_no_two_lead_at_once_and_in_the_end_one_does(seed: int, candidates: int, crash: bool) -> None:
    world = World(Random(seed), candidates, drift=0.04)
    for step in range(40):
        world.run(world.t + world.random.choice([0.1, 1.0, 3.0]))
        world.fault()
        if crash and step == 20 and candidates > 1:
            world.random.choice(world.all).dead = True
    world.faults = False
    for lighthouse in world.all:
        lighthouse.paused_until = 0.0
    world.run(world.t + 25.0)  # what was under way is over, the longest pause too
    started = world.t
    world.run(started + 10 * OPTIONS.lease)
    leaders = [x for x in world.all if not x.dead and x.candidate.leads(x.clock(world.t))]
    assert len(leaders) == 1
    assert max(e for x in world.all for e in x.reigns) == leaders[0].candidate.epoch


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_without_the_margin_fast_clocks_lead_at_once(seed: int) -> None:
    """The check can fail: with clocks that differ by more than the margin it does, in some schedule."""
    broken = []
    for offset in range(40):
        world = World(Random(seed + offset), 3, drift=0.0)
        for lighthouse in world.all:
            lighthouse.rate = world.random.choice([0.5, 1.5])
        try:
            for _ in range(60):
                world.run(world.t + world.random.choice([0.1, 1.0, 3.0]))
                world.fault()
        except AssertionError as e:
            broken.append(str(e))
            break
    assert broken, "no schedule showed it"


def seat(name: str = "c", epoch: int = 3, lease: int = 7) -> Holder:
    return Holder(name, "http://c:1", "c:2", epoch, lease)


def ruling(now: float = 0.0) -> Candidate:
    candidate = Candidate("c", OPTIONS)
    candidate.looked(Register(2, None), now)
    order, _ = candidate.next(now)
    assert order == Order(Op.CAMPAIGN, expected=2, epoch=3)
    assert candidate.campaigned(seat(), now, now) == Began(3)
    return candidate


def test_a_leader_that_was_stopped_does_not_lead_when_it_wakes() -> None:
    candidate = ruling()
    assert candidate.leads(4.49)
    assert not candidate.leads(4.51)
    assert candidate.renewed(True, 4.4, 60.0) == Ended(
        3, "its lease of 5 s may have run out: the register was not reached"
    )
    assert not candidate.leads(60.0)
    assert candidate.next(60.0)[0] == Order(Op.VACATE, lease=7), "its seat may still be there"


def test_a_renewal_counts_from_when_it_was_sent() -> None:
    candidate = ruling()
    assert candidate.next(0.99) == (None, 1.0)
    assert candidate.next(1.0) == (Order(Op.RENEW, lease=7), 1.0)
    assert candidate.renewed(True, 1.0, 1.9) is None
    assert candidate.leads(5.49)
    assert not candidate.leads(5.5)


def test_a_lease_that_the_register_has_ended_ends_the_reign_at_once() -> None:
    candidate = ruling()
    ended = candidate.renewed(False, 1.0, 1.1)
    assert isinstance(ended, Ended)
    assert not candidate.leads(1.1)


def test_a_member_that_has_seen_more_deposes() -> None:
    candidate = ruling()
    assert candidate.told(3, 0.1) is None
    assert candidate.told(9, 0.1) == Ended(3, "epoch 9 has begun elsewhere")
    candidate.vacated(0.2)
    candidate.looked(Register(3, None), 0.3)
    order, _ = candidate.next(0.3)
    assert order == Order(Op.CAMPAIGN, expected=3, epoch=10), "also when the register has forgotten"


def test_a_seat_in_my_name_that_i_do_not_rule_by_is_given_back() -> None:
    candidate = Candidate("c", OPTIONS)
    candidate.looked(Register(2, None), 0.0)
    candidate.unreachable(1.0)  # the answer to the campaign was lost
    assert candidate.next(1.1)[0] is None
    assert candidate.next(1.3)[0] == Order(Op.LOOK)
    candidate.looked(Register(3, seat()), 1.4)
    assert candidate.next(1.4)[0] == Order(Op.VACATE, lease=7)


def test_the_seat_of_a_dead_leader_is_vacated_and_of_another_one_not() -> None:
    candidate = Candidate("d", OPTIONS)
    candidate.looked(Register(3, seat()), 0.0)
    candidate.proven_dead(seat(lease=6), 0.1)
    assert candidate.next(0.1)[0] is None
    candidate.proven_dead(seat(), 0.1)
    assert candidate.next(0.1)[0] == Order(Op.VACATE, lease=7)


def test_a_member_refuses_lower_epochs_and_garbage() -> None:
    guard = EpochGuard()
    assert guard.admit(0)
    assert guard.admit(4)
    assert guard.admit(4)
    assert not guard.admit(3)
    assert not guard.admit(0)
    assert not guard.admit(-1)
    assert not guard.admit(MAX_EPOCH)
    assert guard.highest == 4
    assert plausible(2**20, 0)
    assert not plausible(2**20 + 1, 0)
    assert EpochGuard().admit(
        2**20 + 1
    )  # who has seen nothing believes the first: a lighthouse that was lied to lives on


def test_ids_of_different_epochs_never_meet() -> None:
    assert first_id(1) == 2**32
    assert first_id(MAX_EPOCH) + 2**32 - 1 < 2**62


@pytest.mark.parametrize("wrong", [{"lease": 0.0}, {"drift": 0.5}, {"drift": -0.1}])
def test_impossible_leases_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="lease"):
        LeaseOptions(**wrong)
