"""The question of a group's ranks for their next quorum: gathered from all of them, asked once, answered to each.

The core gathers (:class:`torchft.core.commit.Gather`); this carries its rounds to the lighthouse, and the answer, or
what failed, to all who wait. The twin of :mod:`torchft.coordination.group_vote`, which ends the steps that begin here.

Rules
    - Whatever fails on the way to a quorum is answered to every rank that waits; nobody is left to its deadline.
    - A group with a rank that is no longer there asks for nothing: who comes is told at once, until that rank comes
      itself.
    - A question for which nobody waits any more, because a rank died or the group leaves, is withdrawn: no quorum is
      formed for it, and the group's next question does not wait behind it.
    - The lock is never held while anything is waited for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable

from torchft.coordination import types
from torchft.coordination.lighthouse_link import Answer, LighthouseLink
from torchft.coordination.lighthouses import LIGHTHOUSE_HINT
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.standing_wire import GroupQuorum
from torchft.core.assignment import of_group
from torchft.core.commit import Gather, Gathered
from torchft.runtime.deadline import Deadline
from torchft.runtime.given_up import GivenUp
from torchft.runtime.logs import RankLogger
from torchft.runtime.worker import Worker, end_with

__all__ = ["Ask", "QuorumRound"]


class Ask:
    """A rank's quorum request, and where its answer goes.

    Args:
        rank: of the asking process in its group.
        request: what it asks.
        deadline: its own.
    """

    def __init__(self, rank: int, request: pb.ManagerQuorumRequest, deadline: Deadline) -> None:
        self.rank = rank
        self.request = request
        self.deadline = deadline
        self.answer: concurrent.futures.Future[GroupQuorum] = concurrent.futures.Future()

    def remaining(self) -> float:
        """Seconds in which an answer is still of use."""
        return self.deadline.remaining_to_answer()

    def end(self, outcome: GroupQuorum | Exception) -> None:
        """Answers it, if it has not ended."""
        end_with(self.answer, outcome)


class _Question:
    """What all ranks of a group have come to ask the lighthouse."""

    def __init__(self, asks: list[Ask]) -> None:
        self.asks = asks
        self.given_up = GivenUp()


class QuorumRound:
    """The rounds of one group, one after the other. From any thread.

    Args:
        replica_id, store_addr, world_size: of the group, as the lighthouse is told.
        address: of the group's server, as it is told; asked when it is needed.
        lighthouse: asked once for all ranks.
        lighthouse_addr: for what a rank is told that waited in vain.
        worker: asks, where the thread that comes last cannot.
        on_come: told each rank that comes.
        on_complete: all ranks have come: the group has moved on to its next quorum. Called under the lock.
        log: of the group.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        store_addr: str,
        world_size: int,
        address: Callable[[], str],
        lighthouse: LighthouseLink,
        lighthouse_addr: str,
        worker: Worker,
        on_come: Callable[[int], None],
        on_complete: Callable[[], None],
        log: RankLogger,
    ) -> None:
        self._replica_id = replica_id
        self._store_addr = store_addr
        self._world_size = world_size
        self._address = address
        self._lighthouse = lighthouse
        self._lighthouse_addr = lighthouse_addr
        self._worker = worker
        self._on_come = on_come
        self._on_complete = on_complete
        self._log = log
        self._lock = threading.Lock()
        self._gather: Gather[Ask] = Gather(world_size, "quorum")
        self._question: _Question | None = None  # the one that the lighthouse is asked, or was last
        self._checkpoint_metadata: dict[int, str] = {}
        self._dead_ranks: dict[int, str] = {}
        self._seen_step = 0
        self._quorum_id: int | None = None
        self._loud = True

    def wait(self, ask: Ask) -> GroupQuorum:
        """A rank of this process asks, and waits for the answer.

        Raises:
            TimeoutError: there is none within its deadline: the message says who was waited for.
            ValueError: there is no such rank in the group.
            RuntimeError: any other failure.
        """
        question = self._come(ask)
        if question is not None:
            if self._world_size == 1:
                self._ask_lighthouse(question)  # in this thread: no hop
            else:
                self._worker.submit(lambda: self._ask_lighthouse(question))
        try:
            return ask.answer.result(timeout=ask.deadline.remaining())
        except concurrent.futures.TimeoutError:
            if ask.answer.done():
                return ask.answer.result()
            missing = self._leave(ask, "its deadline passed")
            raise TimeoutError(self._timeout_message(ask, missing)) from None

    async def wait_on_loop(self, ask: Ask) -> GroupQuorum:
        """As :meth:`wait`, on the loop, without blocking it: for a rank of another process."""
        question = self._come(ask)
        if question is not None:
            self._worker.submit(lambda: self._ask_lighthouse(question))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ask.answer), ask.remaining())
        except TimeoutError:
            if ask.answer.done() and not ask.answer.cancelled():
                raise  # it is the answer
            raise TimeoutError(self._timeout_message(ask, self._leave(ask, "its deadline passed"))) from None
        except asyncio.CancelledError:
            self._leave(ask, "its call ended (deadline, or the process is gone)")
            raise

    def end(self, cause: str) -> None:
        """Ends what ranks of this group wait for with an error. What the lighthouse is asked for them is withdrawn."""
        with self._lock:
            waiting = self._gather.values()
            if waiting:
                self._gather.fail(cause)
            question = self._question
        if question is not None:
            waiting += question.asks
        for ask in waiting:
            ask.end(RuntimeError(f"no quorum for this group: {cause}"))
        if question is not None:
            question.given_up.say()

    def rank_is_there(self, rank: int) -> None:
        """If it was dead, it is no longer."""
        with self._lock:
            self._dead_ranks.pop(rank, None)

    def rank_ended(self, rank: int, cause: str) -> None:
        """Until it is there again, there is no quorum for this group; who waits for one is told by :meth:`end`."""
        with self._lock:
            self._dead_ranks[rank] = cause

    @property
    def dead(self) -> str | None:
        """Why this group is not whole, as long as it is not."""
        with self._lock:
            return next(iter(self._dead_ranks.values()), None)

    def waiting_beside(self, rank: int) -> int | None:
        """Another rank that waits for all to come; None: there is none."""
        with self._lock:
            return next((other for other in self._gather.waiting if other != rank), None)

    def checkpoint_metadata(self, rank: int) -> str:
        """What rank ``rank`` said, when it asked, of where its state is to be had.

        Raises:
            KeyError: it has not asked yet.
        """
        with self._lock:
            return self._checkpoint_metadata[rank]

    def speak_up(self) -> None:
        """There is trouble: the next round is told at INFO."""
        self._loud = True

    def _level(self) -> int:
        """The lines of each step are for debugging; those of the first one, and after trouble, tell the story."""
        return logging.INFO if self._loud else logging.DEBUG

    def _timeout_message(self, ask: Ask, missing: tuple[int, ...]) -> str:
        if missing:
            return (
                f"no quorum within {ask.deadline.timeout:g} s: ranks {list(missing)} of this group of "
                f"{self._world_size} did not ask for it. Do they still run?"
            )
        return (
            f"no quorum within {ask.deadline.timeout:g} s: the lighthouse at {self._lighthouse_addr} has not "
            f"answered. Its log says what it waits for; {LIGHTHOUSE_HINT}"
        )

    def _come(self, ask: Ask) -> _Question | None:
        """Adds a rank to the open round. Returns what somebody must ask now, when it is complete."""
        question = None
        with self._lock:
            self._dead_ranks.pop(ask.rank, None)
            if self._dead_ranks:
                ask.end(RuntimeError(f"no quorum for this group: {next(iter(self._dead_ranks.values()))}"))
                return None
            earlier = next((a for a in self._gather.values() if a.rank == ask.rank), None)
            got = self._gather.come(ask.rank, ask)
            self._checkpoint_metadata[ask.rank] = ask.request.checkpoint_metadata
            if got.complete is not None:
                self._question = question = _Question(list(got.complete.values()))
                self._on_complete()
        self._on_come(ask.rank)
        self._log.log(self._level(), "Start quorum for group_rank %d", ask.rank)
        if got.superseded is not None and earlier is not None:
            earlier.end(RuntimeError(f"rank {ask.rank} asked for a quorum again"))
        if got.failed is not None:
            ask.end(RuntimeError(f"no quorum for this group: {got.failed}"))
        return question

    def _leave(self, ask: Ask, cause: str) -> tuple[int, ...]:
        """A rank gave up waiting. Returns the ranks that had not come."""
        with self._lock:
            waiting = {a.rank: a for a in self._gather.values()}
            if waiting.get(ask.rank) is not ask:
                return ()
            missing = self._gather.missing
            got: Gathered[Ask] = self._gather.leave(ask.rank, cause)
        for rank in got.answer:
            waiting[rank].end(RuntimeError(f"no quorum for this group: {got.failed}"))
        return missing

    def _ask_lighthouse(self, question: _Question) -> None:
        """Asks once for all ranks and answers each of them, whatever happens."""
        self._log.log(self._level(), "All workers joined - starting quorum")
        try:
            quorum = self._call_lighthouse(question)
        except Exception as e:
            self._loud = True
            for ask in question.asks:
                ask.end(e)
            return
        level, self._loud = self._level(), False
        for ask in question.asks:
            self._log.log(level, "Finished quorum for group_rank %d", ask.rank)
            ask.end(quorum)

    def _call_lighthouse(self, question: _Question) -> GroupQuorum:
        asks = question.asks
        step, lineage = of_group((a.request.step, a.request.lineage) for a in asks)
        member = pb.QuorumMember(
            replica_id=self._replica_id,
            address=self._address(),
            store_address=self._store_addr,
            step=step,
            lineage=lineage,
            world_size=self._world_size,
            shrink_only=any(a.request.shrink_only for a in asks),
            commit_failures=max(a.request.commit_failures for a in asks),
            timed_out=any(a.request.timed_out for a in asks),
            seen_step=max(self._seen_step, step),
            waits=any(a.request.waits for a in asks),
        )
        init_sync = any(a.request.init_sync for a in asks)
        deadline = Deadline(max(a.remaining() for a in asks))
        answer = self._lighthouse.quorum(member, init_sync, deadline, question.given_up)
        quorum = self._remember_progress(answer)
        new = quorum.quorum_id != self._quorum_id
        self._quorum_id = quorum.quorum_id
        self._loud = self._loud or new
        if new or self._log.isEnabledFor(logging.DEBUG):
            what = types.describe(answer.whole) if answer.whole is not None else str(quorum)
            self._log.log(logging.INFO if new else logging.DEBUG, "got lighthouse quorum %s", what)
        return quorum

    def _remember_progress(self, answer: Answer) -> GroupQuorum:
        """How far this group has seen the job: said again here, since not every lighthouse passes it on."""
        quorum, whole = answer.quorum, answer.whole
        if quorum.quorum is None or whole is None:
            view = quorum.views[0]
            self._seen_step = max(self._seen_step, view.max_step, view.lost_step if view.lost_by_survivor else 0)
            return quorum
        for member in whole.participants:
            if member.replica_id == self._replica_id:
                self._seen_step = member.seen_step = max(self._seen_step, member.seen_step)
        self._seen_step = max(self._seen_step, *(m.step for m in whole.participants))
        return GroupQuorum(self._replica_id, quorum=types.core_quorum(whole))
