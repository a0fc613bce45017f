"""The seat of a lighthouse: by which right it answers, and until when.

The idea
    Decisions are made by :mod:`torchft.core.election`; here are its clock, its thread and its register. A seat is
    :class:`Alone`, whose right is a state file or nothing, or :class:`Shared`, whose right is a lease in a register
    that other lighthouses want, too. Its owner, the lighthouse, begins anew with each reign and forgets everything
    at its end.

Rules
    - Before anything is answered, :meth:`Seat.leads` is asked: it looks at the clock, so a process that was stopped
      finds its lease over before it says a word. What slips through between look and answer is refused by epoch.
    - The clock goes on while the machine sleeps.
    - A member that comes to a standby is kept waiting for a moment if the leader is just being sought, and is then
      sent to the one that leads: nobody has to ask again and again.
    - Who may be training without being heard of is written down before they are told that they may.
    - ``begin`` and ``end`` are called on the loop, in turns.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from typing import Protocol

from torchft.coordination.record import RecordError, StateFile
from torchft.core.election import Began, Candidate, Ended, Holder, LastQuorum, LeaseOptions, Op, Order, Register
from torchft.runtime import loop
from torchft.runtime.clock import lease_clock
from torchft.runtime.life import Sign, examine_now, life_address

__all__ = ["Alone", "Owner", "RegisterClient", "RegisterError", "Seat", "Shared"]

logger = logging.getLogger(__name__)

_PARKING = 2.0
"""Seconds for which a member waits at a standby for a leader to be found, at the longest."""
_GLANCE = 0.2
"""Seconds for a look at the leader's life address."""


class Owner(Protocol):
    """The lighthouse. Both are called on the loop."""

    def begin(self, epoch: int, last: LastQuorum | None) -> None:
        """It leads from now on, in this epoch. ``last`` was the last fenced quorum of those before it."""

    def end(self, leader: str) -> None:
        """It no longer does; ``leader`` does, if that is known."""


class Seat(Protocol):
    """The right to answer. All but ``close`` are called on the loop."""

    @property
    def epoch(self) -> int:
        """Of the reign that the owner was last told of."""

    @property
    def highest(self) -> int:
        """The highest epoch that is known here."""

    @property
    def leader(self) -> str:
        """``http://host:port`` of another one that leads; empty: none is known."""

    def leads(self) -> bool:
        """Whether an answer may be given now."""

    async def told(self, epoch: int) -> None:
        """Somebody has seen this epoch, which is plausible. RuntimeError: it cannot be surpassed."""

    @property
    def durable(self) -> bool:
        """Whether :meth:`remember` does anything."""

    async def remember(self, last: LastQuorum | None) -> None:
        """Writes down the newest fenced quorum. Returns when that is done, or can no longer matter."""

    async def settled(self, unreached: int) -> None:
        """Returns when it is known who leads, other than in the epoch ``unreached``, or after a while."""

    def close(self) -> None:
        """Gives the right back."""


class Alone:
    """The only lighthouse of its job.

    Args:
        record: where its epochs are remembered; closed by :meth:`close`. None: nowhere, the epoch is 0.
        owner: begins with :meth:`start`.

    Raises:
        RecordError: the next epoch could not be written down.
    """

    leader = ""

    def __init__(self, record: StateFile | None, owner: Owner) -> None:
        self._record = record
        self._owner = owner
        self._turn = asyncio.Lock()
        self.epoch = 0 if record is None else record.advance()

    def start(self) -> None:
        """Its reign begins, before anybody can come."""
        self._owner.begin(self.epoch, None if self._record is None else self._record.last)

    @property
    def highest(self) -> int:
        return self.epoch

    def leads(self) -> bool:
        return True

    async def told(self, epoch: int) -> None:
        async with self._turn:
            if epoch <= self.epoch:
                return
            logger.warning(
                "epoch %d has been seen, this lighthouse has %d: it has lost its state file, or has none. It begins a "
                "newer one.",
                epoch,
                self.epoch,
            )
            if self._record is None:
                self.epoch = epoch + 1
            else:
                self.epoch = await asyncio.to_thread(self._record.advance, epoch)
            self._owner.end("")
            self._owner.begin(self.epoch, None if self._record is None else self._record.last)

    @property
    def durable(self) -> bool:
        return self._record is not None

    async def remember(self, last: LastQuorum | None) -> None:
        if self._record is None:
            return
        async with self._turn:
            try:
                await asyncio.to_thread(self._record.remember, last)
            except RecordError as e:
                # To stop the job for it would be worse: it matters only if this lighthouse is started again while
                # these members are cut off.
                logger.error("%s The last quorum is not written down.", e)

    async def settled(self, unreached: int) -> None:
        pass

    def close(self) -> None:
        if self._record is not None:
            self._record.close()


class RegisterError(RuntimeError):
    """The register did not answer, or not sensibly. What was asked for may have been done."""


class RegisterClient(Protocol):
    """A register, as one candidate sees it. Called on one thread."""

    def look(self) -> Register: ...

    def campaign(self, candidate: Holder, expected: int) -> tuple[Holder, LastQuorum | None] | None:
        """Takes the seat with a new lease, whose number the returned one has; None: somebody else has it.

        With it comes the last quorum that was remembered.
        """

    def renew(self, lease: int) -> bool:
        """Whether the lease lived."""

    def vacate(self, lease: int) -> None:
        """Ends a lease, if there is one."""

    def remember(self, epoch: int, last: LastQuorum | None) -> bool:
        """Writes down the last quorum, unless that epoch is over: then False. On any thread."""

    def close(self) -> None: ...


class Shared:
    """One lighthouse among several. Its thread runs from :meth:`start` until :meth:`close`.

    Args:
        register: closed with this.
        options: the lease.
        owner: see there.
    """

    def __init__(self, register: RegisterClient, options: LeaseOptions, owner: Owner) -> None:
        self._register = register
        self._owner = owner
        self._lock = threading.Lock()
        self._candidate = Candidate(uuid.uuid4().hex, options)
        self._wake = threading.Event()
        self._closing = False
        self._reachable = True
        self._provable: Holder | None = None
        self._known: Holder | None = None  # on the loop, like the rest
        self._begun = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._thread = threading.Thread(target=self._run, name="torchft-election", daemon=True)
        self._address = ""

    def start(self, address: str) -> None:
        """From now on it wants to lead.

        Args:
            address: ``http://host:port`` where members reach it.
        """
        self._address = address
        self._thread.start()

    @property
    def epoch(self) -> int:
        return self._begun

    @property
    def highest(self) -> int:
        with self._lock:
            return self._candidate.highest

    @property
    def leader(self) -> str:
        return "" if self._known is None or self._known.name == self._candidate.name else self._known.address

    def leads(self) -> bool:
        if not self._begun:
            return False
        with self._lock:
            leads = self._candidate.leads(lease_clock()) and self._candidate.epoch == self._begun
        if not leads:
            self._over()
        return leads

    async def told(self, epoch: int) -> None:
        with self._lock:
            ended = self._candidate.told(epoch, lease_clock())
        self._heard(ended)
        self._wake.set()
        self.leads()

    durable = True

    async def remember(self, last: LastQuorum | None) -> None:
        epoch, failing = self._begun, False
        while self.leads() and self._begun == epoch:
            try:
                if await asyncio.to_thread(self._register.remember, epoch, last):
                    return
                with self._lock:
                    ended = self._candidate.told(epoch + 1, lease_clock())
                self._heard(ended)
            except RegisterError as e:
                if not failing:
                    logger.warning("%s. The new quorum waits until it is written down.", e)
                failing = True
                await asyncio.sleep(self._candidate.options.looking)

    async def settled(self, unreached: int) -> None:
        try:
            async with asyncio.timeout(_PARKING):
                while not self.leads() and (not self.leader or self._known is None or self._known.epoch <= unreached):
                    changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.add(changed)
                    try:
                        await changed
                    finally:
                        self._waiting.discard(changed)
        except TimeoutError:
            pass

    def close(self) -> None:
        with self._lock:
            self._closing = True
            ended = self._candidate.resign(lease_clock())
        self._heard(ended)
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._register.close()

    # ---------------------------------------------------------- on the loop

    def _began(self, epoch: int, last: LastQuorum | None) -> None:
        self._over()
        self._begun = epoch
        self._owner.begin(epoch, last)
        self.leads()  # it may be over by now
        self._tell_waiting()

    def _over(self) -> None:
        if self._begun:
            self._begun = 0
            self._owner.end(self.leader)

    def _saw(self, holder: Holder | None) -> None:
        former, self._known = self._known, holder
        if holder != former:
            if self.leader:
                assert holder is not None
                logger.info("standby: the lighthouse at %s leads, epoch %d", self.leader, holder.epoch)
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        for changed in self._waiting:
            if not changed.done():
                changed.set_result(None)

    # ----------------------------------------------------------- its thread

    def _run(self) -> None:
        own_life = life_address()
        while True:
            self._wake.clear()
            with self._lock:
                now = lease_clock()
                closing = self._closing
                ended = self._candidate.resign(now) if closing else self._candidate.tick(now)
                order, wait = self._candidate.next(now)
            self._heard(ended)
            if closing:
                if order is not None and order.op is Op.VACATE:
                    self._carry_out(order, own_life)  # once; if it fails the lease ends by itself
                return
            if order is None:
                self._wake.wait(max(0.0, wait - now))
            else:
                self._carry_out(order, own_life)

    def _carry_out(self, order: Order, own_life: str) -> None:
        candidate = self._candidate
        sent_at = lease_clock()
        change: Began | Ended | None = None
        last: LastQuorum | None = None
        try:
            if order.op is Op.LOOK:
                seen = self._register.look()
                with self._lock:
                    candidate.looked(seen, lease_clock())
                self._look_at(seen.holder)
            elif order.op is Op.CAMPAIGN:
                me = Holder(candidate.name, self._address, own_life, order.epoch, 0)
                won = self._register.campaign(me, order.expected)
                with self._lock:
                    change = candidate.campaigned(None if won is None else won[0], sent_at, lease_clock())
                last = None if won is None else won[1]
            elif order.op is Op.RENEW:
                granted = self._register.renew(order.lease)
                with self._lock:
                    change = candidate.renewed(granted, sent_at, lease_clock())
            else:
                self._register.vacate(order.lease)
                with self._lock:
                    candidate.vacated(lease_clock())
        except RegisterError as e:
            with self._lock:
                change = candidate.unreachable(lease_clock())
            if self._reachable:
                self._reachable = False
                logger.warning("%s. Who leads goes on until its lease ends, who does not cannot take over.", e)
        else:
            if not self._reachable:
                self._reachable = True
                logger.info("the register of the lighthouses answers again")
        self._heard(change, last)
        with self._lock:
            known = candidate.holder
        loop.get_loop().call_soon_threadsafe(self._saw, known)

    def _look_at(self, holder: Holder | None) -> None:
        """A leader whose process has ended need not be waited for until its lease ends."""
        if holder is None or holder.name == self._candidate.name or not holder.life_address:
            return
        sign = examine_now(holder.life_address, _GLANCE)
        if sign is Sign.ALIVE:
            self._provable = holder
        elif sign is Sign.GONE and self._provable == holder:
            logger.warning("the process of the lighthouse at %s, which led, has ended", holder.address)
            with self._lock:
                self._candidate.proven_dead(holder, lease_clock())

    def _heard(self, change: Began | Ended | None, last: LastQuorum | None = None) -> None:
        """On any thread."""
        if isinstance(change, Began):
            logger.info("this lighthouse (%s) leads from now on: epoch %d", self._address, change.epoch)
            loop.get_loop().call_soon_threadsafe(self._began, change.epoch, last)
        elif isinstance(change, Ended):
            logger.warning(
                "this lighthouse (%s) no longer leads (epoch %d): %s", self._address, change.epoch, change.cause
            )
            loop.get_loop().call_soon_threadsafe(self.leads)
