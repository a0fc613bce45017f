"""The lighthouses of a job as a client sees them: which one is asked now, and the newest epoch seen.

The idea
    A job has one lighthouse, or several of which one leads (:mod:`torchft.core.election`). With one address this is
    a channel and nothing else: a lighthouse that is away is waited for. With several, one is *current*; whoever
    finds that it is gone, or does not lead, says so, and the next one is current, or the leader that it named.

Rules
    - Answers of a lower epoch than the highest seen are refused: their sender was deposed and does not know.
    - A leader that is named is followed even if it is not on the list; the list is where one falls back to.
    - With several, a connection that is silent although something is waited for is pinged, and given up after
      ``_PING`` and ``_PATIENCE``: gRPC's threads of a lighthouse that is stopped do not answer.
    - Pauses between attempts grow and are drawn by chance: a thousand groups look for the same leader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from torchft.coordination.channel import connect, knock, open_channel, reason
from torchft.coordination.proto import session_pb2_grpc
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.coordination.proto import torchft_pb2_grpc as pb_grpc
from torchft.core.election import EpochGuard
from torchft.runtime.deadline import Deadline
from torchft.runtime.given_up import GivenUp, Withdrawn
from torchft.runtime.net import parse_addresses
from torchft.runtime.retry import Backoff

__all__ = ["LEADER_KEY", "LIGHTHOUSE_HINT", "Lighthouses", "Place", "elsewhere"]

T = TypeVar("T")

LIGHTHOUSE_HINT = (
    "Is it running (torchft_lighthouse --min_replicas 1 --bind '[::]:29510'), and does TORCHFT_LIGHTHOUSE name "
    "its host and port as seen from this machine?"
)

LEADER_KEY = "torchft-leader"
"""In the trailing metadata of a call that a standby refuses: the address of the leader, or nothing."""

_PING = 1.0
_PATIENCE = 2.0
_GLANCE = 1.0
"""Seconds that one of several addresses gets to answer at first."""


def elsewhere(error: BaseException) -> str | None:
    """The leader that a refused call names, empty if it names none; None: it was not refused for that reason."""
    if not isinstance(error, grpc.Call):
        return None
    for key, value in error.trailing_metadata() or ():
        if key == LEADER_KEY:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return None


class Place:
    """A channel to one lighthouse, and what can be called there."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.lighthouse = pb_grpc.LighthouseServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)


class Lighthouses:
    """Thread-safe. Nothing is connected before :meth:`connect` or the first use.

    Args:
        addresses: ``http://host:port``, or several with commas between.

    Raises:
        ValueError: one of them is no address.
    """

    def __init__(self, addresses: str) -> None:
        self.addresses = parse_addresses(addresses)
        self._lock = threading.Lock()
        self._guard = EpochGuard()
        self._current = self.addresses[0]
        self._unreached = 0
        self._places: dict[str, Place] = {}
        self._closed = False

    def __str__(self) -> str:
        return ", ".join(self.addresses)

    @property
    def current(self) -> str:
        """The address that is asked now."""
        return self._current

    @property
    def several(self) -> bool:
        """There is more than one place to ask."""
        return len(self.addresses) > 1 or self._current not in self.addresses

    @property
    def epoch(self) -> int:
        """The highest that was seen; 0: none."""
        return self._guard.highest

    @property
    def unreached(self) -> int:
        """The epoch of the leader that was left because it did not answer, until another one answers."""
        return self._unreached

    def admit(self, epoch: int) -> bool:
        """Whether an answer of this epoch may be believed. It comes from the one that leads, then."""
        with self._lock:
            admitted = self._guard.admit(epoch)
            if admitted:
                self._unreached = 0
            return admitted

    def place(self) -> Place:
        """The current one.

        Raises:
            ValueError: closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError("the connection to the lighthouse was closed")
            place = self._places.get(self._current)
            if place is None:
                place = Place(open_channel(self._current, (_PING, _PATIENCE) if self.several else None))
                self._places[self._current] = place
            return place

    def begin(self) -> tuple[str, session_pb2_grpc.SessionServiceStub]:
        """As of :class:`torchft.coordination.session_client.Servers`."""
        return self._current, self.place().sessions

    def leave(self, address: str, leader: str | None = None) -> None:
        """The lighthouse at ``address`` is not the one to ask; nothing happens if it is not current any more.

        Args:
            leader: the one that it named; empty: it knows of none; None: it does not answer at all.
        """
        with self._lock:
            if address != self._current or self._closed:
                return
            if leader is None:
                self._unreached = self._guard.highest
            try:
                named = parse_addresses(leader)[0] if leader else address
            except ValueError:
                named = address  # garbage
            if named == address:
                at = self.addresses.index(address) if address in self.addresses else -1
                named = self.addresses[(at + 1) % len(self.addresses)]
            if leader is None or address not in self.addresses:
                # Not closed: calls of other threads there end by themselves. gRPC would wait before it connects a
                # channel again that failed; a new one connects at once.
                self._places.pop(address, None)
            self._current = named

    def connect(self, deadline: Deadline) -> None:
        """Returns when one of them answers, and makes it current. Those that are not there yet are waited for.

        Raises:
            TimeoutError: none answered in time.
        """
        if len(self.addresses) == 1:
            channel = connect(self._current, deadline, what="lighthouse", hint=LIGHTHOUSE_HINT)
            with self._lock:
                self._places[self._current] = Place(channel)
            return
        backoff = Backoff(0.02, 1.0)
        while True:
            causes = []
            for _ in self.addresses:
                address = self._current
                try:
                    knock(self.place().channel, min(_GLANCE, deadline.remaining()), wait_for_ready=False)
                    return
                except grpc.RpcError as e:
                    causes.append(f"{address}: {reason(e)}")
                    self.leave(address)
            time.sleep(min(backoff.delay(), deadline.remaining()))
            if deadline.expired:
                self.close()
                raise TimeoutError(
                    f"none of the lighthouses {self} answered within {deadline.timeout:g} s of trying to connect "
                    f"({'; '.join(causes)}). {LIGHTHOUSE_HINT}"
                )

    def call(
        self,
        invoke: Callable[[Place, float, bool], T],
        deadline: Deadline,
        stop: threading.Event | None = None,
    ) -> T:
        """Makes a call at the one that leads.

        With one address it is one call, which waits for a lighthouse that is away. With several, and after a
        redirect, it is made again elsewhere until the deadline.

        Args:
            invoke: given where, seconds, and whether to wait for the connection.
            deadline: for all attempts together.
            stop: ends the attempts early when set.

        Raises:
            grpc.RpcError: of the last attempt.
        """
        backoff = Backoff(0.02, 1.0)
        stop = stop or threading.Event()
        while True:
            address, several = self._current, self.several
            try:
                return invoke(self.place(), deadline.remaining(), not several)
            except grpc.RpcError as e:
                leader = elsewhere(e)
                gone = several and isinstance(e, grpc.Call) and e.code() == grpc.StatusCode.UNAVAILABLE
                if leader is None and not gone:
                    raise
                self.leave(address, leader)
                if stop.wait(min(backoff.delay(), deadline.remaining())) or deadline.expired:
                    raise

    def quorum(
        self,
        member: pb.QuorumMember,
        deadline: Deadline,
        stop: threading.Event | None = None,
        given_up: GivenUp | None = None,
    ) -> pb.Quorum:
        """Asks for the next quorum with a call of its own, and waits for it.

        Raises:
            Withdrawn: it was given up; the call is cancelled.
            grpc.RpcError: the call failed.
            RuntimeError: whoever answered was deposed.
        """
        request = pb.LighthouseQuorumRequest(requester=member, epoch=self.epoch)
        given_up = given_up or GivenUp()

        def ask(place: Place, left: float, wait: bool) -> pb.LighthouseQuorumResponse:
            call = place.lighthouse.Quorum.future(request, timeout=left, wait_for_ready=wait)
            given_up.then(call.cancel)
            try:
                response: pb.LighthouseQuorumResponse = call.result()
                return response
            except grpc.FutureCancelledError:
                raise Withdrawn("it was given up") from None

        while True:
            response = self.call(ask, deadline, stop)
            if self.admit(response.epoch):
                quorum: pb.Quorum = response.quorum
                return quorum
            refused = RuntimeError(self.why_refused(response.epoch))
            if not self.several or deadline.expired:
                raise refused
            self.leave(self._current, "")

    def why_refused(self, epoch: int) -> str:
        """In words, for an answer that :meth:`admit` did not admit."""
        return (
            f"the lighthouse at {self._current} answers for epoch {epoch}, but epoch {self.epoch} has begun: it was "
            f"deposed and does not know it, or it lost its state file"
        )

    def close(self) -> None:
        """Ends all connections; calls under way fail. Idempotent."""
        with self._lock:
            self._closed = True
            places, self._places = self._places, {}
        for place in places.values():
            place.channel.close()
