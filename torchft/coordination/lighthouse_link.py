"""A replica group's connection to its lighthouse: quorum calls, and signs of life.

The idea
    One session (:mod:`torchft.coordination.session_client`) shows that the group lives and brings the news of
    deaths. A lighthouse that knows no sessions gets heartbeats instead, from the first quorum request on: a group
    that still loads its data keeps nobody waiting.

    While the quorum stands (:mod:`torchft.core.standing`) there is nothing to ask: :meth:`LighthouseLink.quorum`
    answers by itself. A question whose session is lost waits a moment for the next one, then looks whether the group
    may go on: when a change of the members was agreed on and the lighthouse is gone, it is forgotten.

    Where several lighthouses are named (:mod:`torchft.coordination.lighthouses`), the session finds the one that leads
    and finds the next one when that is gone; a question that was under way is asked again there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import grpc

from torchft.coordination import types
from torchft.coordination.channel import reason, translate
from torchft.coordination.lighthouses import LIGHTHOUSE_HINT, Lighthouses
from torchft.coordination.proto import session_pb2
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.session_client import NotYet, SessionClient, SessionEvents, SessionLost
from torchft.coordination.standing_link import StandingLink
from torchft.coordination.standing_wire import GroupQuorum
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.given_up import GivenUp, Withdrawn
from torchft.runtime.life import life_address
from torchft.runtime.logs import RankLogger
from torchft.runtime.net import parse_address
from torchft.runtime.retry import retry

__all__ = ["Answer", "LighthouseLink"]

_FIRST_SESSION = 2.0
"""Seconds that a first question waits for the session before it is sent by a call of its own."""


@dataclass(frozen=True)
class Answer:
    """To a group's question."""

    quorum: GroupQuorum
    whole: pb.Quorum | None
    """As the lighthouse told it, for the log; None where it was not told, or not asked."""


class LighthouseLink:
    """Connected from construction until ``close``.

    Args:
        addresses: ``http://host:port`` of the lighthouse, or several with commas between.
        replica_id: of the group.
        world_size: its ranks.
        hostname: of this machine as others are told it; chosen by the route when empty.
        connect_timeout: how long a lighthouse that is not there yet is waited for.
        heartbeat_interval: between heartbeats, where there is no session.
        quorum_retries: how often a quorum call that broke is repeated within its deadline.
        sessions: False: heartbeats only.
        on_notice: called for each replica that is no longer there.
        log: of the group.

    Raises:
        TimeoutError: the lighthouse did not answer within ``connect_timeout``.
    """

    def __init__(
        self,
        addresses: str,
        *,
        replica_id: str,
        world_size: int,
        hostname: str,
        connect_timeout: timedelta,
        heartbeat_interval: timedelta,
        quorum_retries: int,
        sessions: bool,
        on_notice: Callable[[types.Notice], None],
        log: RankLogger,
    ) -> None:
        self._lighthouses = Lighthouses(addresses)
        self._replica_id = replica_id
        self._heartbeat_interval = seconds(heartbeat_interval)
        self._quorum_retries = quorum_retries
        self._log = log
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._asked = False
        self._heartbeats: threading.Thread | None = None
        self._needs_heartbeats = not sessions
        self._welcome: session_pb2.Welcome | None = None
        self._on_timeouts: Callable[[timedelta, timedelta], None] | None = None
        log.info("Creating LighthouseClient: establishing connection to %s", self._lighthouses)
        self._lighthouses.connect(Deadline(connect_timeout))
        self.standing = StandingLink(replica_id, world_size, log)
        self.calls = 0
        """Questions that went to a lighthouse."""
        self._on_notice = on_notice
        self._session: SessionClient | None = None
        if sessions:
            self._life_address = life_address(parse_address(self._lighthouses.current), hostname)
            self._session = SessionClient(
                self._lighthouses,
                self._hello,
                SessionEvents(
                    notice=self._noticed,
                    welcome=self._welcomed,
                    unsupported=self._unsupported,
                    lost=self.standing.lost,
                    beat=self.standing.beat,
                    answered=self.standing.answered,
                    told=self._told,
                ),
                f"lighthouse {self._lighthouses}",
                log,
            )

    def _hello(self) -> session_pb2.Hello:
        hello = session_pb2.Hello(
            replica_id=self._replica_id,
            life_address=self._life_address,
            active=self._asked,
            epoch=self._lighthouses.epoch,
            unreached=self._lighthouses.unreached,
        )
        self.standing.introduce(hello)
        return hello

    def _noticed(self, notice: types.Notice) -> None:
        self.standing.notice(notice)
        self._on_notice(notice)

    def _told(self, message: session_pb2.SessionDown) -> session_pb2.SessionUp | None:
        if message.WhichOneof("kind") != "over":
            return self.standing.told(message)
        notice = self.standing.over(message.over)
        if notice is not None:
            self._on_notice(notice)
        return None

    def quorum(
        self, member: pb.QuorumMember, init_sync: bool, deadline: Deadline, given_up: GivenUp | None = None
    ) -> Answer:
        """The quorum of the member's next step: the one that stands, or the next one, which is asked for.

        Args:
            member: as it describes itself.
            init_sync: at step 0 all groups take the primary's state.
            deadline: for the answer.
            given_up: said when nobody waits for it any more: it is withdrawn then, and this returns.

        Raises:
            Withdrawn: it was given up.
            TimeoutError: none formed in time.
            RuntimeError: any other failure.
        """
        given_up = given_up or GivenUp()
        with self._lock:
            self._asked = True
        self._begin_heartbeats()
        if not member.commit_failures:
            self.standing.committed(member.step - 1)

        # The same number however often it is sent: a request whose answer was lost is answered by the same quorum.
        member.attempt = random.getrandbits(62) + 1

        def attempt() -> Answer:
            lost = False
            while True:
                given_up.check()
                if not lost and self._goes_on(member):
                    return Answer(self.standing.quorum(member.step), None)
                if deadline.expired:
                    raise TimeoutError("it has not answered, and the group cannot go on without its word")
                if self._stop.is_set():
                    raise RuntimeError("the connection was closed")
                session = self._session
                if session is None or not self._has_session(session, deadline, given_up):
                    # One that restarts is waited for; only a call that broke is a failure.
                    self.calls += 1
                    return self._whole(self._lighthouses.quorum(member, deadline, self._stop, given_up))
                if lost and not session.stands:
                    lost = False
                    continue
                try:
                    answer = self._ask(session, member, init_sync, deadline, given_up)
                except SessionLost as e:
                    self._log.info("%s; asking again", e)
                    lost = True
                else:
                    if answer is not None:
                        return answer

        try:
            return retry(
                attempt,
                deadline=deadline,
                retryable=_worth_another_call,
                attempts=1 + self._quorum_retries,
                on_retry=lambda e, delay: self._log.warning(
                    "quorum at the lighthouse %s failed (%s); next attempt in %.2f s",
                    self._lighthouses,
                    reason(e) if isinstance(e, grpc.RpcError) else e,
                    delay,
                ),
                stop=self._stop,
            )
        except grpc.RpcError as e:
            raise translate(
                e,
                what="lighthouse",
                address=str(self._lighthouses),
                call="quorum",
                timeout=deadline.timeout,
                hint=self._hint(),
            ) from e
        except Withdrawn:
            raise
        except NotYet as e:
            raise TimeoutError(f"quorum at the lighthouse {self._lighthouses} did not end in time: {e}") from None
        except TimeoutError as e:
            raise TimeoutError(
                f"quorum at the lighthouse {self._lighthouses} did not end within {deadline.timeout:g} s ({e}). "
                f"{self._hint()}"
            ) from None
        except RuntimeError as e:
            raise RuntimeError(f"quorum: the lighthouse at {self._lighthouses}: {e}") from e

    def _hint(self) -> str:
        """For a question without an answer: why the one that came is not believed, or what may be wrong."""
        refused = "" if self._session is None else self._session.refused
        return f"{refused[:1].upper()}{refused[1:]}" or LIGHTHOUSE_HINT

    def _goes_on(self, member: pb.QuorumMember) -> bool:
        return not member.commit_failures and self.standing.stands(member.step)

    def _ask(
        self,
        session: SessionClient,
        member: pb.QuorumMember,
        init_sync: bool,
        deadline: Deadline,
        given_up: GivenUp,
    ) -> Answer | None:
        """Asks on the session. None: the group is to go on with what it has."""
        ready = session_pb2.Ready(member=member, init_sync=init_sync)
        ready.uses = self.standing.asks(member.step, member.commit_failures)
        self.calls += 1
        answer = session.ask(ready, deadline, given_up)
        if answer.go_on:
            member.attempt = random.getrandbits(62) + 1
            return None
        if not answer.HasField("grant"):
            return self._whole(answer.quorum)
        if self.standing.urgent():
            session.beat()
        return Answer(self.standing.quorum_asked(), answer.quorum if answer.HasField("quorum") else None)

    def _whole(self, quorum: pb.Quorum) -> Answer:
        return Answer(GroupQuorum(self._replica_id, quorum=types.core_quorum(quorum)), quorum)

    def _has_session(self, session: SessionClient, deadline: Deadline, given_up: GivenUp) -> bool:
        """Waits for the session where one is to be expected. False: there is none, and will be none.

        Where a quorum stands it returns after a moment in any case: a question without a session would break it.

        Raises:
            TimeoutError: the deadline passed.
            Withdrawn: it was given up.
        """
        if session.stands:
            return True
        if self.standing.granted:
            return _within(session, min(self.standing.patience, deadline.remaining()), given_up) or (
                self.standing.can_go_on() or session.wait(deadline, given_up)
            )
        if self._lighthouses.several:
            return session.wait(deadline, given_up)  # it is what finds the one that leads
        return _within(session, min(_FIRST_SESSION, deadline.remaining()), given_up)

    def tell_timeouts(self, listener: Callable[[timedelta, timedelta], None]) -> None:
        """Calls ``listener`` once with the lighthouse's heartbeat and join timeouts, as soon as they are known."""
        with self._lock:
            self._on_timeouts = listener
        self._pass_timeouts()

    def _welcomed(self, welcome: session_pb2.Welcome) -> None:
        with self._lock:
            self._welcome = welcome
        self.standing.welcomed(welcome)
        self._pass_timeouts()

    def _pass_timeouts(self) -> None:
        with self._lock:
            welcome, listener = self._welcome, self._on_timeouts
            if welcome is None or listener is None:
                return
            self._on_timeouts = None
        milli = timedelta(milliseconds=1)
        listener(welcome.heartbeat_timeout_ms * milli, welcome.join_timeout_ms * milli)

    def leave(self, reason: str, step: int, timeout: float) -> bool:
        """Says that this group goes; see :meth:`SessionClient.leave`. It is heard of no more."""
        self._stop.set()
        return self._session is not None and self._session.leave(reason, step, timeout)

    def drain(self) -> bool:
        """Says that this group waits for the next change of the members, to go then. Returns whether it was said."""
        if self._session is None or not self._session.stands:
            return False
        self._session.drain()
        return True

    def report(self, replica_id: str, cause: str) -> None:
        """Says that a replica is dead, as far as a session allows it."""
        if self._session is not None:
            self._session.report(replica_id, cause)

    def close(self) -> None:
        """Ends the connection; calls under way fail. Idempotent."""
        self._stop.set()
        self.standing.close()
        if self._session is not None:
            self._session.close()
        self._lighthouses.close()
        if self._heartbeats is not None:
            self._heartbeats.join(timeout=5)

    # --------------------------------------------------------- heartbeats

    def _unsupported(self) -> None:
        self._log.info(
            "the lighthouse %s knows no sessions: deaths are seen by missing heartbeats and by timeouts",
            self._lighthouses,
        )
        with self._lock:
            self._needs_heartbeats = True
        if self._asked:
            self._begin_heartbeats()

    def _begin_heartbeats(self) -> None:
        with self._lock:
            if not self._needs_heartbeats or self._heartbeats is not None or self._stop.is_set():
                return
            self._heartbeats = threading.Thread(target=self._beat, name="torchft-heartbeat", daemon=True)
            self._heartbeats.start()

    def _beat(self) -> None:
        request = pb.LighthouseHeartbeatRequest(replica_id=self._replica_id)
        failing = False
        while not self._stop.wait(self._heartbeat_interval):
            try:
                self._lighthouses.call(
                    lambda place, left, wait: place.lighthouse.Heartbeat(request, timeout=left), Deadline(5), self._stop
                )
            except (grpc.RpcError, ValueError) as e:  # ValueError: the channel was closed by close()
                if self._stop.is_set():
                    return
                if not failing:
                    cause = reason(e) if isinstance(e, grpc.RpcError) else str(e)
                    self._log.warning("heartbeats do not reach the lighthouse %s: %s", self._lighthouses, cause)
                failing = True
            else:
                if failing:
                    self._log.info("heartbeats reach the lighthouse %s again", self._lighthouses)
                failing = False


def _within(session: SessionClient, timeout: float, given_up: GivenUp) -> bool:
    """Whether the session stands, now or soon."""
    try:
        return session.wait(Deadline(timeout), given_up)
    except TimeoutError:
        return False


def _worth_another_call(error: Exception) -> bool:
    return isinstance(error, grpc.Call) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
