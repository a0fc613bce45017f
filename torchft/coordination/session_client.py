"""The member's side of a session: kept open for as long as the member lives.

The idea
    One daemon thread holds the stream (proto/session.proto) and reads what comes; when the stream ends it opens
    another, with growing pauses that are drawn by chance. Signs of life are sent a few times per heartbeat timeout
    of the server, but none of this has to run in time: gRPC's C threads answer the server's pings without it.

Rules
    - A server that does not know sessions (an older lighthouse) is asked once: ``unsupported`` is called.
    - When the stream is lost, the server's life address is looked at: a refusal proves that its process has ended.
      Otherwise it may be silent (:mod:`torchft.coordination.silence`).
    - Which server it is, is asked before each connection (:class:`Servers`). One that answers for a lower epoch than
      was seen is left, and so is one that says it does not lead. After a session was lost the same server is tried
      once more before another one.
    - ``leave`` is answered by the server after everybody was told, so whoever left may end at once.
    - What a listener raises is logged and no matter of the session: without it nothing would be heard any more.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc

from torchft.coordination.channel import answered, reason
from torchft.coordination.proto import session_pb2 as pb
from torchft.coordination.proto import session_pb2_grpc as pb_grpc
from torchft.coordination.silence import Silence
from torchft.coordination.types import Notice
from torchft.runtime.deadline import Deadline
from torchft.runtime.given_up import Flag, GivenUp, Withdrawn
from torchft.runtime.life import Sign, examine_now
from torchft.runtime.logs import RankLogger
from torchft.runtime.retry import Backoff
from torchft.runtime.worker import end_with

__all__ = ["NotYet", "OneServer", "Servers", "SessionClient", "SessionEvents", "SessionLost"]

T = TypeVar("T")

_BEATS = 5
"""Signs of life per heartbeat timeout."""
_MAX_WHY = 4096
"""Characters of a reason, at most."""


class SessionLost(RuntimeError):
    """The stream ended while an answer was waited for."""


class NotYet(TimeoutError):
    """The server has no answer so far. The message says what it waits for."""


class Servers(Protocol):
    """Where a session may be held."""

    def begin(self) -> tuple[str, pb_grpc.SessionServiceStub]:
        """The server to connect to now, and its name. ValueError: closed."""

    def admit(self, epoch: int) -> bool:
        """Whether a server of this epoch may be believed."""

    def why_refused(self, epoch: int) -> str:
        """In words, where :meth:`admit` said no."""

    def leave(self, address: str, leader: str | None = None) -> None:
        """That server does not lead, but ``leader``, which may be empty; None: it does not answer."""


class OneServer:
    """Always the same one.

    Args:
        channel: to the server; not closed here.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = pb_grpc.SessionServiceStub(channel)

    def begin(self) -> tuple[str, pb_grpc.SessionServiceStub]:
        return "", self._stub

    def admit(self, epoch: int) -> bool:
        return True

    def why_refused(self, epoch: int) -> str:
        return ""

    def leave(self, address: str, leader: str | None = None) -> None:
        pass


@dataclass(frozen=True)
class SessionEvents:
    """What a member wants to know. All are called on the session's threads."""

    notice: Callable[[Notice], None]
    """A replica is no longer there."""
    welcome: Callable[[pb.Welcome], None] = lambda _: None
    """The session stands, for the first time or again."""
    gone: Callable[[str], None] = lambda _: None
    """The server's process has ended, with the cause."""
    silent: Callable[[str], None] = lambda _: None
    """The server gives no sign of life, with the cause. Told once, until ``back``."""
    back: Callable[[], None] = lambda: None
    """The session with a server that was silent stands again; called before anything that the server says now."""
    unsupported: Callable[[], None] = lambda: None
    """The server knows no sessions; nothing else will be called."""
    lost: Callable[[], None] = lambda: None
    """The session that stood has ended."""
    beat: Callable[[], int] = lambda: 0
    """A sign of life is sent now: the number that it carries."""
    answered: Callable[[pb.Answer], None] = lambda _: None
    """A question was answered, before who asked it knows."""
    told: Callable[[pb.SessionDown], pb.SessionUp | None] = lambda _: None
    """Something else was said. What is returned is sent."""


class SessionClient:
    """A session, from construction until ``close``.

    Args:
        servers: where to.
        hello: describes the member, asked at each connection.
        events: see there.
        server: its role and address, for messages.
        log: of the member.
    """

    def __init__(
        self,
        servers: Servers,
        hello: Callable[[], pb.Hello],
        events: SessionEvents,
        server: str,
        log: RankLogger,
    ) -> None:
        self._servers = servers
        self._hello = hello
        self._events = events
        self._server = server
        self._log = log
        self.refused = ""
        """Why nothing is believed that the server says, if it said something since a session stood."""
        self._interval = 1.0
        self._silence = Silence()
        self._life_address = ""
        self._lock = threading.Lock()
        self._request_id = 0
        self._answers: dict[int, concurrent.futures.Future[pb.Answer]] = {}
        self._not_yet = ""  # why there is no answer, as the server said last
        self._not_yet_told = ""
        self._outbox: queue.SimpleQueue[pb.SessionUp | None] = queue.SimpleQueue()
        self._call: Any = None
        self._stands = threading.Event()
        self._settled = Flag()  # it stands, or never will
        self._left = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchft-session", daemon=True)
        self._thread.start()

    @property
    def stands(self) -> bool:
        """The server has answered, and the stream has not ended since."""
        return self._stands.is_set()

    def wait(self, deadline: Deadline, given_up: GivenUp | None = None) -> bool:
        """Waits until the session stands. Returns False if it never will.

        Raises:
            TimeoutError: the deadline passed.
            Withdrawn: it was given up.
        """
        if not self._settled.wait(deadline.remaining(), given_up or GivenUp()):
            raise TimeoutError(f"no {self._server} has answered for {deadline.timeout:g} s")
        return self.stands

    def ask(self, ready: pb.Ready, deadline: Deadline, given_up: GivenUp | None = None) -> pb.Answer:
        """Asks for the next quorum and waits for the answer.

        Raises:
            Withdrawn: it was given up, which the server is told.
            NotYet: the deadline passed, and the server has said what it waits for.
            TimeoutError: the deadline passed.
            SessionLost: the session ended meanwhile.
            RuntimeError: the server refused.
        """
        with self._lock:
            self._request_id += 1
            request_id = self._request_id
            answer: concurrent.futures.Future[pb.Answer] = concurrent.futures.Future()
            if not self._stands.is_set():
                raise SessionLost(f"there is no session with the {self._server} right now")
            self._answers[request_id] = answer
            self._not_yet = ""
            outbox = self._outbox
        ready.request_id = request_id
        withdraw = pb.SessionUp(withdraw=pb.Withdraw(request_id=request_id))
        outbox.put(pb.SessionUp(ready=ready))
        if given_up is not None:
            given_up.then(lambda: end_with(answer, Withdrawn("it was given up")))
        try:
            return answer.result(deadline.remaining())
        except Withdrawn:
            outbox.put(withdraw)
            raise
        except concurrent.futures.TimeoutError:
            if answer.done() and not isinstance(answer.exception(), Withdrawn):
                return answer.result()
            outbox.put(withdraw)
            if self._not_yet:
                raise NotYet(f"no answer within {deadline.timeout:.3g} s: {self._not_yet}") from None
            raise TimeoutError(f"no answer within {deadline.timeout:.3g} s") from None
        finally:
            with self._lock:
                self._answers.pop(request_id, None)

    def beat(self) -> None:
        """Sends a sign of life now, not when the next one is due."""
        self._outbox.put(self._sign_of_life())

    def drain(self) -> None:
        """Says that this member waits for the next change of the members, to go then."""
        self._outbox.put(pb.SessionUp(drain=pb.Drain()))

    def _sign_of_life(self) -> pb.SessionUp:
        return pb.SessionUp(beat=pb.Beat(number=self._events.beat()))

    def report(self, replica_id: str, cause: str) -> None:
        """Tells the server that a replica is dead. Nothing happens while the session does not stand."""
        self._outbox.put(pb.SessionUp(report=pb.Report(replica_id=replica_id, cause=cause)))

    def leave(self, reason: str, step: int, timeout: float) -> bool:
        """Says that the member goes, and closes the session.

        Args:
            reason: for the others.
            step: all steps below it are committed.
            timeout: seconds to wait for the answer.

        Returns:
            Whether the server has told everybody.
        """
        if self._stands.is_set() and not self._closed.is_set():
            self._outbox.put(pb.SessionUp(leave=pb.Leave(reason=reason, step=step)))
            self._left.wait(timeout)
        self.close()
        return self._left.is_set()

    def close(self) -> None:
        """Ends the stream without a word. Idempotent."""
        self._closed.set()
        self._settled.set()
        self._outbox.put(None)
        call = self._call
        if call is not None:
            call.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        backoff = Backoff(0.02, 1.0)
        while not self._closed.is_set():
            outbox: queue.SimpleQueue[pb.SessionUp | None] = queue.SimpleQueue()
            self._outbox = outbox
            address, leader = "", None
            try:
                address, stub = self._servers.begin()
                call = self._call = stub.Session(self._messages(outbox))
                if self._closed.is_set():
                    call.cancel()  # close() has seen the call before this one
                epoch = 0
                for message in call:
                    self._silence.sign(time.monotonic())
                    if message.HasField("redirect"):
                        leader = message.redirect.leader
                        continue
                    if message.HasField("welcome"):
                        epoch = message.welcome.epoch
                    if not self._servers.admit(epoch):
                        self._refuse(epoch)
                        leader = ""
                        break
                    if self._take(message):
                        backoff = Backoff(0.02, 1.0)
                cause = "the server ended it" if leader is None else "it does not lead"
                self._silence.sign(time.monotonic())
                call.cancel()
            except grpc.RpcError as e:
                if isinstance(e, grpc.Call) and e.code() == grpc.StatusCode.UNIMPLEMENTED:
                    self._settled.set()
                    self._events.unsupported()
                    return
                if answered(e):
                    self._silence.sign(time.monotonic())
                cause = reason(e)
            except ValueError as e:  # the channel was closed
                cause = str(e)
            finally:
                outbox.put(None)
            if self._closed.is_set() or self._left.is_set():
                self._fail_answers("it was closed")
                return
            stood = self._stands.is_set()
            self._lost(cause)
            if leader is not None or not stood:
                self._servers.leave(address, leader)
            self._pause(backoff.delay())

    def _pause(self, delay: float) -> None:
        """Before the next attempt. Tells of a server that is silent."""
        remaining = self._silence.remaining(time.monotonic())
        self._closed.wait(delay if remaining is None else min(delay, remaining))
        silence = self._silence.begins(time.monotonic())
        if silence is not None and not self._closed.is_set():
            cause = f"no sign of life for {silence:.1f} s: stopped, cut off, or no longer serving"
            self._tell(self._events.silent, cause)

    def _refuse(self, epoch: int) -> None:
        why = self._servers.why_refused(epoch)
        if why != self.refused:
            self.refused = why
            self._log.warning("%s: nothing it says is believed", why)

    def _messages(self, outbox: queue.SimpleQueue[pb.SessionUp | None]) -> Iterator[pb.SessionUp]:
        """On a thread of gRPC's."""
        yield pb.SessionUp(hello=self._hello())
        while True:
            try:
                message = outbox.get(timeout=self._interval)
            except queue.Empty:
                message = self._sign_of_life()
            if message is None:
                return
            yield message

    def _take(self, message: pb.SessionDown) -> bool:
        """Returns whether it was the welcome."""
        kind = message.WhichOneof("kind")
        if kind == "answer":
            self._answered(message.answer)
        elif kind == "notice":
            self._tell(self._events.notice, Notice.from_wire(message.notice))
        elif kind == "left":
            self._left.set()
        elif kind == "waiting":
            why = self._not_yet = message.waiting.why[:_MAX_WHY]
            level = logging.DEBUG if why == self._not_yet_told else logging.INFO
            self._not_yet_told = why
            self._log.log(level, "the %s has no quorum yet: %s", self._server, why)
        elif kind == "welcome":
            welcome = message.welcome
            self._interval = max(0.01, welcome.heartbeat_timeout_ms / 1000 / _BEATS)
            if welcome.life_address not in ("", self._life_address):
                seen = examine_now(welcome.life_address) is Sign.ALIVE
                self._life_address = welcome.life_address if seen else ""
            if self._silence.stands(time.monotonic(), welcome.heartbeat_timeout_ms / 1000):
                self._tell(self._events.back)
            self.refused = ""
            self._tell(self._events.welcome, welcome)
            self._stands.set()
            self._settled.set()
            return True
        else:
            reply = self._tell(self._events.told, message)
            if reply is not None:
                self._outbox.put(reply)
        return False

    def _fail_answers(self, cause: str) -> None:
        with self._lock:
            self._stands.clear()
            if not self._closed.is_set():
                self._settled.clear()
            answers, self._answers = self._answers, {}
        for answer in answers.values():
            end_with(answer, SessionLost(f"the session with the {self._server} was lost: {cause}"))

    def _answered(self, message: pb.Answer) -> None:
        with self._lock:
            answer = self._answers.pop(message.request_id, None)
        if answer is None:
            return  # nobody waits for it any more
        if message.error:
            end_with(answer, RuntimeError(message.error))
            return
        try:
            self._events.answered(message)
        except Exception as e:
            end_with(answer, RuntimeError(str(e)))
        else:
            end_with(answer, message)

    def _lost(self, cause: str) -> None:
        self._silence.failed(time.monotonic())
        if self._stands.is_set():
            self._log.warning("the session with the %s was lost (%s); connecting again", self._server, cause)
            self._tell(self._events.lost)
        self._fail_answers(cause)
        if self._life_address and examine_now(self._life_address) is Sign.GONE:
            self._tell(self._events.gone, f"the process of the {self._server} has ended")

    def _tell(self, listener: Callable[..., T], *what: object) -> T | None:
        try:
            return listener(*what)
        except Exception:
            self._log.exception("what the session with the %s said could not be dealt with", self._server)
            return None
