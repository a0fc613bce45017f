"""Those that wait for a quorum at a lighthouse, and how each of them is answered.

An asker is answered once: with a quorum, with the word to go on with the one it has, or with what went wrong.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from torchft.coordination import types
from torchft.coordination.proto import session_pb2
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.session_server import Link
from torchft.coordination.standing_wire import grant_to_wire
from torchft.core.assignment import AssignmentError, Seating
from torchft.core.membership import Member, Quorum

__all__ = ["Answers", "Asker", "Call", "Question"]

_TELL_ALL = 8
"""In quorums up to this size everybody is told all about everybody, for the logs."""


class Answers:
    """A quorum, as it is told to those who asked for it: what they have in common is made once."""

    def __init__(self, quorum: Quorum) -> None:
        self.seating = Seating(quorum)
        self._wire: pb.Quorum | None = None

    def whole(self) -> pb.Quorum:
        """All of it: for those that speak only part 1 of the protocol."""
        if self._wire is None:
            self._wire = types.quorum_to_wire(self.seating.quorum, time.time())
        return self._wire

    def for_logs(self) -> pb.Quorum | None:
        return self.whole() if len(self.seating.quorum.participants) <= _TELL_ALL else None


class Asker(Protocol):
    """Somebody who waits for a quorum."""

    def succeed(self, answers: Answers) -> None: ...

    def go_on(self, quorum_id: int) -> None:
        """There is no other quorum: that one stands."""

    def fail(self, cause: str) -> None: ...

    def not_yet(self, why: str) -> None:
        """There is no quorum yet; it waits on."""

    def moved(self) -> None:
        """Another lighthouse has to be asked."""


class Call:
    """By a call of its own."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[pb.Quorum] = asyncio.get_running_loop().create_future()

    def succeed(self, answers: Answers) -> None:
        if not self.answer.done():
            self.answer.set_result(answers.whole())

    def go_on(self, quorum_id: int) -> None:
        self.fail(f"quorum {quorum_id} stands, and only on a session one can go on with it")

    def fail(self, cause: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(RuntimeError(cause))

    def not_yet(self, why: str) -> None:
        """A call has one answer."""

    def moved(self) -> None:
        self.fail("this lighthouse no longer leads")


class Question:
    """On a session: half the processor time of a call."""

    def __init__(self, link: Link, request_id: int, member: Member | None = None, init_sync: bool = True) -> None:
        self.link = link
        self.request_id = request_id
        self._member = member
        self._init_sync = init_sync

    def succeed(self, answers: Answers) -> None:
        if self._member is None or not self._member.standing:
            self._send(session_pb2.Answer(request_id=self.request_id, quorum=answers.whole()))
            return
        try:
            grant = grant_to_wire(answers.seating, self._member, self._init_sync)
        except AssignmentError as e:
            self.fail(str(e))
            return
        self._send(session_pb2.Answer(request_id=self.request_id, grant=grant, quorum=answers.for_logs()))

    def go_on(self, quorum_id: int) -> None:
        self._send(session_pb2.Answer(request_id=self.request_id, go_on=quorum_id))

    def fail(self, cause: str) -> None:
        self._send(session_pb2.Answer(request_id=self.request_id, error=cause))

    def not_yet(self, why: str) -> None:
        self.link.send(session_pb2.SessionDown(waiting=session_pb2.Waiting(why=why)))

    def moved(self) -> None:
        """The end of the session says it."""

    def _send(self, answer: session_pb2.Answer) -> None:
        self.link.send(session_pb2.SessionDown(answer=answer))
