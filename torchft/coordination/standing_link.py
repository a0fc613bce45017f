"""A group's side of standing quorums: :class:`StandingMember` between its session and its steps.

What the session brings is heard on the session's thread, questions are asked on the thread of a step, so one lock
guards the machine. Nothing is waited for under it, except for the lighthouse's word where a lease has run out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torchft.coordination.proto import session_pb2
from torchft.coordination.standing_wire import (
    GroupQuorum,
    ack_to_wire,
    announcement_to_wire,
    grant_from_wire,
    message_from_wire,
)
from torchft.coordination.types import Notice
from torchft.core.standing import Decide, Over, Prepare
from torchft.core.standing_member import MayCommit, StandingMember
from torchft.runtime.clock import lease_clock
from torchft.runtime.deadline import Deadline
from torchft.runtime.logs import RankLogger

__all__ = ["LEASE_RAN_OUT", "StandingLink"]

LEASE_RAN_OUT = (
    "the lighthouse has not answered since the lease of this group's quorum ran out: others may have formed another "
    "one meanwhile"
)
"""Why a step is not committed that all ranks have voted yes on."""


class StandingLink:
    """Of one group, in its rank 0.

    Args:
        replica_id: of the group.
        world_size: its ranks.
        log: of the group.
    """

    def __init__(self, replica_id: str, world_size: int, log: RankLogger) -> None:
        self._replica_id = replica_id
        self._world_size = world_size
        self._log = log
        self._machine = StandingMember()
        self._changed = threading.Condition()
        self._quorum: GroupQuorum | None = None
        self._hello_sent = 0.0
        self._asked_at = 0.0
        self._closed = False
        self.granted = False
        """The lighthouse knows standing quorums."""
        self.patience = 0.0
        """Seconds that a question whose session was lost waits for the next one, before the group goes on."""

    # ------------------------------------------------------------ the session

    def introduce(self, hello: session_pb2.Hello) -> None:
        """Adds what a hello says of standing quorums. It is sent now."""
        with self._changed:
            hello.standing = True
            announced = self._machine.announcement()
            if announced is not None:
                hello.announced.CopyFrom(announcement_to_wire(announced))
            self._hello_sent = lease_clock()

    def welcomed(self, welcome: session_pb2.Welcome) -> None:
        """The session stands."""
        with self._changed:
            self.granted = welcome.lease_ms > 0
            heartbeat_timeout = welcome.heartbeat_timeout_ms / 1000
            self.patience = heartbeat_timeout / 2
            self._machine.welcomed(welcome.lease_ms / 1000, heartbeat_timeout, welcome.quorum_id, self._hello_sent)
            self._changed.notify_all()

    def lost(self) -> None:
        """The session ended."""
        with self._changed:
            self._machine.lost()
            self._changed.notify_all()

    def beat(self) -> int:
        """The number of the sign of life that is sent now."""
        with self._changed:
            return self._machine.beat(lease_clock())

    def told(self, message: session_pb2.SessionDown) -> session_pb2.SessionUp | None:
        """Hears a message about standing quorums. Returns the answer, if one is due."""
        ack = None
        with self._changed:
            if message.WhichOneof("kind") == "heard":
                self._machine.beat_answered(message.heard.number, message.heard.quorum_id)
            else:
                said = message_from_wire(message)
                if isinstance(said, Prepare):
                    ack = self._machine.prepare(said)
                elif isinstance(said, Decide):
                    ack = self._machine.decide(said)
            self._changed.notify_all()
        return None if ack is None else ack_to_wire(ack)

    def over(self, message: session_pb2.Over) -> Notice | None:
        """The quorum that was announced is over. Returns what the group is told if it is in use."""
        with self._changed:
            concerns = self._machine.over(Over(message.quorum_id, message.cause))
            self._changed.notify_all()
        if not concerns:
            return None
        cause = f"its quorum {message.quorum_id} is over: {message.cause}"
        return Notice(self._replica_id, cause, message.quorum_id, lives=True, since=message.quorum_id)

    def notice(self, notice: Notice) -> None:
        """A replica is no longer there, or broke its quorum."""
        if notice.since > 0:
            with self._changed:
                self._machine.notice(notice.since, notice.quorum_id, str(notice))
                self._changed.notify_all()

    def answered(self, answer: session_pb2.Answer) -> None:
        """A question was answered. On the session's thread: nothing that came later is heard before.

        Raises:
            AssignmentError: the answer makes no sense.
        """
        with self._changed:
            if answer.go_on:
                self._machine.go_on(answer.go_on, self._asked_at)
            elif answer.HasField("grant"):
                grant, views = grant_from_wire(answer.grant, self._world_size)
                self._machine.entered(grant, views[0].max_step, self._asked_at)
                self._quorum = GroupQuorum(self._replica_id, views)
            else:
                self._quorum = None

    def close(self) -> None:
        """Nothing is waited for any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -------------------------------------------------------------- the steps

    def asks(self, step: int, commit_failures: int) -> int:
        """A question for the quorum of ``step`` is sent now. Returns the quorum that the group could go on with."""
        with self._changed:
            self._asked_at = lease_clock()
            return 0 if commit_failures else self._machine.uses(step)

    def stands(self, step: int) -> bool:
        """Whether ``step`` begins now, with the quorum there is."""
        with self._changed:
            return self._quorum is not None and self._machine.start(step, lease_clock()).stands

    def quorum(self, step: int) -> GroupQuorum:
        """The quorum in use, at a step that stands."""
        assert self._quorum is not None
        return self._quorum.stand(step)

    def quorum_asked(self) -> GroupQuorum:
        """The quorum in use, as it was answered."""
        assert self._quorum is not None
        return self._quorum

    def can_go_on(self) -> bool:
        """Whether a standing quorum is in use, whatever has been agreed on."""
        with self._changed:
            announced = self._machine.announcement()
            return announced is not None and announced.stands

    def urgent(self) -> bool:
        """Whether a sign of life should be sent now."""
        with self._changed:
            return self._machine.urgent(lease_clock())

    def may_commit(self) -> MayCommit:
        """Whether the step under way may commit."""
        with self._changed:
            return self._machine.commit(lease_clock())

    def wait_to_commit(self, deadline: Deadline, given_up: Callable[[], bool] = lambda: False) -> str:
        """Whether the step under way may commit; waits for the lighthouse if the lease has run out.

        Args:
            deadline: for the lighthouse's word.
            given_up: whether nobody waits any more; looked at again when :meth:`ended` is called.

        Returns:
            Why not; empty if it may.
        """
        with self._changed:
            while (may := self._machine.commit(lease_clock())) is MayCommit.WAIT:
                if self._closed or given_up() or not self._changed.wait(deadline.remaining()):
                    return LEASE_RAN_OUT
            return "" if may is MayCommit.YES else "this group's quorum was given up by the lighthouse"

    def ended(self, step: int, committed: bool) -> None:
        """The step under way is over."""
        with self._changed:
            self._machine.ended(step, committed)
            self._changed.notify_all()

    def committed(self, step: int) -> None:
        """The group says, by what it asks, that all steps up to this one are committed."""
        with self._changed:
            announced = self._machine.announcement()
            if announced is not None and announced.step == step:
                self._machine.ended(step, True)
