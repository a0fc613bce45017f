"""The trainer's side of one child: it carries our collectives.

The idea
    The child hosts an ordinary process group. It is told to configure it, and each collective; it answers how each
    ended. It can be killed at any moment, which ends whatever it does: that is all there is to aborting.

Rules
    1. What is asked is sent in the order of asking. Answers come in any order.
    2. A child that ends, for whatever reason, fails everything that it has not answered, at once. One that does not
       answer for the timeout and a grace is killed.
    3. Nobody waits for a child except for its answers: sending to one that takes nothing ends after the timeout.
    4. The reading thread is the only one that touches what a collective has written, and it ends with the child.
    5. It has ended before the interpreter is taken apart: a thread that comes back from torch to an interpreter that is
       gone ends the process by ``std::terminate``.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from torchft.process_group.baby.calls import Plan, result_of
from torchft.process_group.baby.memory import Adopted, Block, Pool
from torchft.process_group.baby.work import BabyWork
from torchft.process_group.base import ProcessGroupError
from torchft.process_group.dummy import COLLECTIVES
from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children_fd
from torchft.runtime.loop import Timer, call_later
from torchft.runtime.messages import Channel, Message
from torchft.runtime.nursery import Nursery, NurseryProcess

__all__ = ["GRACE", "Carrier"]

logger = logging.getLogger(__name__)

GRACE = 1.0
"""Seconds beyond the timeout after which an answer is not late but missing."""

_BURIAL = 5.0  # seconds in which a killed process is gone, unless the kernel holds it
_AT_EXIT = 2.0  # seconds for the last answers


class Carrier:
    """A child, started by the constructor.

    Args:
        nursery: makes it.
        host: ``module:Class`` of the group that it hosts.
        device: that group's: ``cpu``, ``cuda:1``, …
        make_block: a new block of that number and size, for the collectives' tensors.
        deadline: until when it must have begun.
        wanted: asked while it is waited for.

    Raises:
        NurseryError: it did not begin.
    """

    def __init__(
        self,
        nursery: Nursery,
        host: str,
        device: str,
        make_block: Callable[[int, int], Block],
        deadline: Deadline,
        wanted: Callable[[], bool],
    ) -> None:
        self._pool = Pool(make_block)
        self._adopted = Adopted(
            lambda number, size, file: self._send({"adopt": number, "size": size}, None, (file,)),
            lambda numbers: self._send({"gone": numbers}, None),
        )
        self._lock = threading.Lock()
        self._waiting: dict[int, Callable[[Message | None], None]] = {}  # answers, by number; None: it has ended
        self._next = 0
        self._reason: str | None = None
        self._over = False
        self._failed: Callable[[], Callable[[Exception], None] | None] = _nobody
        self.timeout = timedelta(seconds=deadline.timeout)
        ours, theirs = socket.socketpair()
        close_in_children_fd(ours)
        with theirs:
            try:
                arguments = {"host": host, "device": device, "timeout": deadline.timeout}
                target = "torchft.process_group.baby.child:main"
                self._process: NurseryProcess = nursery.spawn(target, arguments, [theirs.fileno()], deadline, wanted)
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours, deadline.timeout)
        self._owner = os.getpid()
        self.issue: dict[str, Callable[..., BabyWork]] = {op: partial(self._issue, op) for op in COLLECTIVES}
        """The collectives by name."""
        self.rank = 0
        self._reader = threading.Thread(target=self._read, name="torchft-baby", daemon=True)
        self._reader.start()
        _living.add(self)

    @property
    def pid(self) -> int:
        """The child's."""
        return self._process.pid

    @property
    def idle(self) -> bool:
        """It lives, and owes no answer."""
        return not self._waiting and not self._over and self._reason is None

    def on_failure(self, failed: Callable[[Exception], None]) -> None:
        """From now on the bound method is told the first error of a collective, and the child's end. It does not keep
        its object alive."""
        self._failed = weakref.WeakMethod(failed)

    def kill(self, reason: str) -> None:
        """Ends the child and everything that it does, at once. The first reason counts. From any thread."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
        if os.getpid() != self._owner:
            return
        self._process.signal(signal.SIGKILL)
        self._channel.hang_up()  # the reading thread need not wait for the kernel to take the process apart

    def join(self, deadline: Deadline) -> None:
        """Waits until all that it was asked has an answer, after :meth:`kill`."""
        self._reader.join(deadline.remaining())

    # ----------------------------------------------------------------------------------------------- asking

    def configure(
        self, arguments: Message, timeout: timedelta, answered: Callable[[], None]
    ) -> Callable[[], Message | None]:
        """Has the child configure its group.

        Args:
            arguments: of ``configure``.
            timeout: of the group from now on.
            answered: called when the answer is there, or the child has ended.

        Returns:
            A function that gives the answer; None: there is none, yet or at all.

        Raises:
            ProcessGroupError: the child has ended.
        """
        answers: list[Message | None] = []

        def answer(message: Message | None) -> None:
            answers.append(message)
            answered()

        self.set_timeout(timeout)
        self.rank = int(arguments["rank"])
        self._send({"configure": arguments}, answer)
        return lambda: answers[0] if answers else None

    def set_timeout(self, timeout: timedelta) -> None:
        """Of later collectives."""
        self.timeout = timeout
        self._channel.set_send_timeout(timeout.total_seconds())
        self._send({"timeout": timeout.total_seconds()}, None)

    def end(self) -> ProcessGroupError:
        """Why it cannot be asked."""
        return ProcessGroupError(self._reason or "the child process has ended")

    def _issue(self, op: str, *args: Any) -> BabyWork:
        plan = Plan(op, args, self.rank, self._adopted.number)
        block: Block | None = None
        message: Message = {"call": op, "args": plan.arguments}
        files: tuple[int, ...] = ()
        if plan.moves_tensors:
            block, new, gone = self._pool.take(plan.nbytes)
            message["block"] = block.number
            if gone:
                message["gone"] = gone
            try:
                if new:
                    message["new"], files = block.introduce()
                block.load(plan)
            except BaseException:
                self._pool.keep(block)
                raise
        timeout = plan.timeout or self.timeout
        work = BabyWork(result_of(op, args))
        timer = call_later(timeout.total_seconds() + GRACE, partial(self._late, op, timeout))
        self._send(message, partial(self._done, work, plan, block, timer), files)
        if files and block is not None:
            block.introduced()
        return work

    def _send(
        self, message: Message, answer: Callable[[Message | None], None] | None, files: tuple[int, ...] = ()
    ) -> None:
        with self._lock:  # the order of asking is the order of sending
            if self._over or self._reason is not None:
                raise self.end()
            if answer is not None:
                self._next += 1
                message["id"] = self._next
                self._waiting[self._next] = answer
            try:
                self._channel.send(message, files)
                return
            except OSError as e:
                self._waiting.pop(self._next, None)
                error = f"the child process takes nothing: {e}"
        self.kill(error)
        raise ProcessGroupError(error)

    def _late(self, op: str, timeout: timedelta) -> None:
        self.kill(f"the child process did not answer: {op} did not end within {timeout.total_seconds():g} s")

    # ---------------------------------------------------------------------------------------------- answers

    def _read(self) -> None:
        try:
            while (received := self._channel.receive()) is not None:
                message = received[0]
                with self._lock:
                    answer = self._waiting.pop(int(message["id"]))
                answer(message)
                del answer, message, received  # and with them the tensors
        except Exception as e:
            logger.exception("the answers of the child process %d cannot be understood", self.pid)
            self.kill(f"the child process answers nonsense: {e}")
        self._bury()

    def _bury(self) -> None:
        if self._reason is None:  # it was not us
            code = self._process.wait(_BURIAL)
            how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
            with self._lock:
                self._reason = self._reason or f"the child process {self.pid} that carries the collectives died{how}"
        with self._lock:
            self._over = True
            waiting, self._waiting = list(self._waiting.values()), {}
        self._tell(self.end())
        for answer in waiting:
            answer(None)
        self._process.signal(signal.SIGKILL)  # it may have closed its end and live on
        if self._process.wait(_BURIAL) is not None:
            self._pool.close()
        else:  # what it may still write into is not used again
            logger.warning("the child process %d is still there %g s after SIGKILL", self.pid, _BURIAL)
        self._channel.close()

    def _done(self, work: BabyWork, plan: Plan, block: Block | None, timer: Timer, message: Message | None) -> None:
        timer.cancel()
        error: Exception | None = None
        event = None
        if message is None:
            error = self.end()
        elif message["error"] is not None:
            error = ProcessGroupError(message["error"])
            self._tell(error)
        elif block is not None:
            try:
                event = block.unload(plan)
            except Exception as e:
                error = e
                self._tell(e)
        if block is not None:
            self._pool.give_back(block) if error is None else self._pool.keep(block)
        work.finish(error, event)

    def _tell(self, error: Exception) -> None:
        failed = self._failed()
        if failed is not None:
            failed(error)


def _nobody() -> None:
    return None


def _end_all() -> None:
    deadline = Deadline(_AT_EXIT)
    carriers = list(_living)
    for carrier in carriers:
        carrier.kill("the process ends")
    for carrier in carriers:
        carrier.join(deadline)


_living: weakref.WeakSet[Carrier] = weakref.WeakSet()
atexit.register(_end_all)
os.register_at_fork(after_in_child=_living.clear)  # they are the parent's
