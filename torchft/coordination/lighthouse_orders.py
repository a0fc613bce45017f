"""The order in which a lighthouse does what its core wants: who may train unheard of is written down first.

Rules
    - A fenced quorum that differs from the one in the record is written down before it is answered. What comes
      after it waits as well: nobody is told of a death in a quorum that it has not been given yet.
    - Without a record, and where nothing has changed, nothing waits: all is done at once.
    - With a new reign, and with the end of one, everything that waits is forgotten.

Everything runs on the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from torchft.core.election import LastQuorum
from torchft.core.membership import Member, Quorum
from torchft.core.standing import Orders

__all__ = ["OrderQueue", "Pending", "quorum_of"]


def quorum_of(last: LastQuorum) -> Quorum:
    """As the core wants to know the last quorum of an earlier life."""
    members = tuple(Member(replica_id, standing=True) for replica_id, _ in last.members)
    return Quorum(last.quorum_id, members, fenced=True)


@dataclass(frozen=True, slots=True)
class Pending:
    """What one event led to."""

    orders: Orders
    asked: str
    """The replica whose request this answers."""
    quorum_id: int
    """Of the newest quorum then."""


class OrderQueue:
    """See the module's docstring.

    Args:
        do: carries out one event's orders.
        write: writes down a fenced quorum, or that the newest one is not fenced, and returns what was written.
    """

    def __init__(self, do: Callable[[Pending], None], write: Callable[[Quorum | None], Awaitable[LastQuorum | None]]):
        self._do = do
        self._write = write
        self._waiting: deque[Pending] = deque()
        self._durable = False
        self._written: LastQuorum | None = None
        self._writing: asyncio.Task[None] | None = None

    def begin(self, last: LastQuorum | None, durable: bool) -> None:
        """A reign begins, or one ends.

        Args:
            last: what the record has.
            durable: there is a record.
        """
        self._waiting.clear()
        self._durable = durable
        self._written = last
        self._writing = None  # one that is under way ends without a word

    def add(self, pending: Pending) -> None:
        """Carries it out, now or after what waits before it."""
        self._waiting.append(pending)
        if self._writing is None:
            self._go_on()

    def _go_on(self) -> None:
        while self._waiting:
            formed = [o.quorum for o in self._waiting[0].orders.outcomes if o.quorum is not None]
            fenced = formed[-1] if formed and formed[-1].fenced else None
            if self._durable and formed and not self._is_written(fenced):
                self._writing = asyncio.get_running_loop().create_task(self._write_down(fenced))
                return
            self._do(self._waiting.popleft())

    def _is_written(self, fenced: Quorum | None) -> bool:
        if fenced is None or self._written is None:
            return fenced is None and self._written is None
        return fenced.quorum_id == self._written.quorum_id

    async def _write_down(self, fenced: Quorum | None) -> None:
        this = asyncio.current_task()
        written = await self._write(fenced)
        if self._writing is not this:
            return  # another reign
        self._writing = None
        self._written = written
        if self._waiting:
            self._do(self._waiting.popleft())
        self._go_on()
