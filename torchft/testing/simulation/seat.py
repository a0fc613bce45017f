"""By which right a simulated lighthouse answers: a record of its own, or a lease in a register that several share.

Mirrors ``coordination/election.py`` (the seat and its loop), ``coordination/etcd.py`` (what the register does) and
``coordination/record.py``. The machine of ``core/election.py`` decides. The register itself is taken for reliable, as
etcd's majority is: it can be cut off from some lighthouses, but it does not fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from torchft.core.election import Began, Candidate, Ended, Holder, LeaseOptions, Op, Order, Register
from torchft.core.membership import Quorum
from torchft.runtime.life import Sign
from torchft.testing.simulation.network import Network
from torchft.testing.simulation.world import Process, Timer

__all__ = ["REGISTER", "Alone", "Owner", "Seat", "Shared", "SharedRegister"]

REGISTER = "etcd"
"""Its name in faults."""


class Owner(Protocol):
    """The lighthouse."""

    def begin(self, epoch: int) -> None:
        """It leads from now on."""

    def end(self) -> None:
        """It no longer does."""


class Seat(Protocol):
    """The right to answer."""

    last: Quorum | None
    """The last quorum, as the record has it."""

    @property
    def leader(self) -> str:
        """Another one that leads; empty: none is known."""

    @property
    def epoch(self) -> int:
        """Of the reign that the owner was last told of; 0: none."""

    def start(self) -> None:
        """The lighthouse's process has begun."""

    def leads(self) -> bool:
        """Whether an answer may be given now."""

    def told(self, epoch: int) -> None:
        """Somebody has seen this epoch."""


class Alone:
    """The only lighthouse of its job, with a state file.

    Args:
        owner: begins at once.
    """

    leader = ""

    def __init__(self, owner: Owner) -> None:
        self.epoch = 0
        self.last: Quorum | None = None
        self._owner = owner

    def start(self) -> None:
        self.epoch += 1
        self._owner.begin(self.epoch)

    def leads(self) -> bool:
        return True

    def told(self, epoch: int) -> None:
        pass


class SharedRegister:
    """The register of several lighthouses.

    Args:
        net: between it and them.
        options: the lease.
    """

    def __init__(self, net: Network, options: LeaseOptions) -> None:
        self.net = net
        self.options = options
        self.last: Quorum | None = None
        self.epoch = 0
        self._holder: Holder | None = None
        self._lease = 0
        self._ends = 0.0

    def serve(self, order: Order, me: Holder) -> Register | Holder | bool | None:
        """Carries out what a lighthouse asks for, now."""
        now = self.net.world.now
        if self._holder is not None and now >= self._ends:
            self._holder = None
        if order.op is Op.LOOK:
            return Register(self.epoch, self._holder)
        if order.op is Op.CAMPAIGN:
            if self._holder is not None or order.expected != self.epoch:
                return None
            self._lease += 1
            self.epoch = order.epoch
            self._holder = replace(me, lease=self._lease)
            self._ends = now + self.options.lease
            return self._holder
        mine = self._holder is not None and self._holder.lease == order.lease
        if order.op is Op.RENEW:
            if mine:
                self._ends = now + self.options.lease
            return mine
        if mine:
            self._holder = None
        return None


class Shared:
    """One lighthouse among several.

    Args:
        process: of the lighthouse.
        register: of all of them.
        owner: the lighthouse.
        find: the process of the lighthouse of this name.
        make: the core's machine; a test gives another one.
    """

    def __init__(
        self,
        process: Process,
        register: SharedRegister,
        owner: Owner,
        find: Callable[[str], Process],
        make: Callable[[str, LeaseOptions], Candidate] = Candidate,
    ) -> None:
        self.process = process
        self._register = register
        self._owner = owner
        self._find = find
        self._make = make
        self._candidate: Candidate
        self._begun = 0
        self._asked = 0
        self._timer: Timer | None = None
        self._provable: Holder | None = None

    @property
    def last(self) -> Quorum | None:
        return self._register.last

    @last.setter
    def last(self, quorum: Quorum | None) -> None:
        self._register.last = quorum

    @property
    def epoch(self) -> int:
        return self._begun

    @property
    def leader(self) -> str:
        holder = self._candidate.holder
        return "" if holder is None or holder.name == self._candidate.name else holder.address

    def start(self) -> None:
        name = f"{self.process.name}:{self.process.life}"
        self._candidate = self._make(name, self._register.options)
        self._me = Holder(name, self.process.name, name, 0, 0)
        self._begun = 0
        self._timer = None
        self._go_on()

    def leads(self) -> bool:
        if not self._begun:
            return False
        candidate = self._candidate
        if candidate.leads(self.process.time) and candidate.epoch == self._begun:
            return True
        self._over()
        return False

    def told(self, epoch: int) -> None:
        if epoch > self._begun:
            self._heard(self._candidate.told(epoch, self.process.time))
            self.leads()

    # ---------------------------------------------------------------- the loop

    def _go_on(self) -> None:
        """One turn: what is over is over, and what is due is asked for."""
        now = self.process.time
        self._heard(self._candidate.tick(now))
        order, wait = self._candidate.next(now)
        if order is None:
            self._timer = self.process.after(max(0.001, wait - now), self._go_on)
            return
        self._asked += 1
        net, name, world = self._register.net, self.process.name, self.process.world
        patience = self._register.options.patience
        self._timer = self.process.after(patience, self._unanswered, self._asked)
        if not net.is_cut(name, REGISTER):
            way = net.latency(name, REGISTER)
            world.at(world.now + way, self._serve, order, replace(self._me, epoch=order.epoch), self._asked, now)

    def _serve(self, order: Order, me: Holder, number: int, sent_at: float) -> None:
        """In the register."""
        answer = self._register.serve(order, me)
        net, name = self._register.net, self.process.name
        if me.name == f"{name}:{self.process.life}" and not net.is_cut(REGISTER, name):
            net.world.to(self.process, net.latency(REGISTER, name), self._answered, order, answer, number, sent_at)

    def _unanswered(self, number: int) -> None:
        if number == self._asked:
            self._asked += 1
            self._heard(self._candidate.unreachable(self.process.time))
            self._go_on()

    def _answered(
        self, order: Order, answer: Register | Holder | bool | None, number: int, sent_at: float
    ) -> None:  # fmt: skip
        if number != self._asked:
            return  # it was given up
        self._asked += 1
        assert self._timer is not None
        self._timer[4] = None
        candidate, now = self._candidate, self.process.time
        if isinstance(answer, Register):
            candidate.looked(answer, now)
            self._look_at(answer.holder)
        elif order.op is Op.CAMPAIGN:
            self._heard(candidate.campaigned(answer if isinstance(answer, Holder) else None, sent_at, now))
        elif order.op is Op.RENEW:
            self._heard(candidate.renewed(bool(answer), sent_at, now))
        else:
            candidate.vacated(now)
        self._go_on()

    def _look_at(self, holder: Holder | None) -> None:
        """A leader whose process has ended need not be waited for until its lease ends."""
        if holder is None or holder.name == self._candidate.name:
            return
        name, _, life = holder.life_address.partition(":")

        def saw(sign: Sign) -> None:
            if sign is Sign.ALIVE:
                self._provable = holder
            elif sign is Sign.GONE and self._provable == holder:
                self._candidate.proven_dead(holder, self.process.time)

        self._register.net.look(self.process, self._find(name), int(life), saw)

    def _heard(self, change: Began | Ended | None) -> None:
        if isinstance(change, Began):
            self._over()
            self._begun = change.epoch
            self.process.world.point("reign", self.process.name)
            self._owner.begin(change.epoch)
        elif isinstance(change, Ended):
            self.process.world.tell(self.process.name, "no longer leads (epoch %s): %s", change.epoch, change.cause)
            self.leads()

    def _over(self) -> None:
        if self._begun:
            newer = self._register.epoch > self._begun
            self._begun = 0
            self.process.world.point("fenced leader" if newer else "reign ended", self.process.name)
            self._owner.end()
