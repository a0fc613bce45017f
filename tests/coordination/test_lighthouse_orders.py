"""What has to be written down first, and what waits for it."""

from __future__ import annotations

import asyncio

from torchft.coordination.lighthouse_orders import OrderQueue, Pending, quorum_of
from torchft.core.election import LastQuorum
from torchft.core.membership import Member, Outcome, Quorum
from torchft.core.standing import Orders


def event(name: str, quorum: Quorum | None = None) -> Pending:
    return Pending(Orders(outcomes=(Outcome(quorum=quorum),)), name, 0)


def fenced(quorum_id: int, *names: str) -> Quorum:
    return Quorum(quorum_id, tuple(Member(n) for n in names), fenced=True)


class Record:
    """Writes when it is told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.asked: list[Quorum | None] = []
        self.may = asyncio.Event()
        self.queue = OrderQueue(lambda pending: self.done.append(pending.asked), self.write)

    async def write(self, quorum: Quorum | None) -> LastQuorum | None:
        self.asked.append(quorum)
        await self.may.wait()
        self.may.clear()
        return None if quorum is None else LastQuorum(quorum.quorum_id, tuple((r, "") for r in quorum.replica_ids))

    async def written(self) -> None:
        self.may.set()
        for _ in range(5):
            await asyncio.sleep(0)


def test_a_fenced_quorum_and_what_comes_after_it_waits_until_it_is_written_down() -> None:
    async def play() -> None:
        record = Record()
        record.queue.begin(None, durable=True)
        record.queue.add(event("before"))
        record.queue.add(event("a quorum", fenced(5, "a", "b")))
        record.queue.add(event("a death in it"))
        await asyncio.sleep(0)
        assert record.done == ["before"]
        await record.written()
        assert record.done == ["before", "a quorum", "a death in it"]
        record.queue.add(event("the same", fenced(5, "a", "b")))
        assert record.done[-1] == "the same", "it is written down already"
        record.queue.add(event("another", fenced(6, "a")))
        record.queue.add(event("one without leases", Quorum(7, (Member("a"),))))
        await asyncio.sleep(0)
        assert record.done[-1] == "the same"
        await record.written()
        assert record.done[-1] == "another"
        await record.written()
        assert record.done[-1] == "one without leases"
        assert record.asked == [fenced(5, "a", "b"), fenced(6, "a"), None]

    asyncio.run(play())


def test_without_a_record_nothing_waits() -> None:
    async def play() -> None:
        record = Record()
        record.queue.begin(None, durable=False)
        record.queue.add(event("a quorum", fenced(5, "a")))
        assert record.done == ["a quorum"]
        assert not record.asked

    asyncio.run(play())


def test_the_end_of_a_reign_forgets_what_waits() -> None:
    async def play() -> None:
        record = Record()
        record.queue.begin(LastQuorum(4, ()), durable=True)
        record.queue.add(event("a quorum", fenced(5, "a")))
        await asyncio.sleep(0)
        record.queue.begin(LastQuorum(5, (("a", ""),)), durable=True)
        record.queue.add(event("of the next reign"))
        await record.written()
        assert record.done == ["of the next reign"]

    asyncio.run(play())


def test_the_core_is_told_names_and_that_they_keep_leases() -> None:
    quorum = quorum_of(LastQuorum(9, (("a", "h:1"), ("b", ""))))
    assert (quorum.quorum_id, quorum.replica_ids, quorum.fenced) == (9, ("a", "b"), True)
