"""A client of the lighthouse, for one replica or for an onlooker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import grpc

from torchft.coordination import types
from torchft.coordination.channel import translate
from torchft.coordination.lighthouses import LIGHTHOUSE_HINT, Lighthouses, elsewhere
from torchft.coordination.proto import session_pb2
from torchft.coordination.proto import torchft_pb2 as pb
from torchft.runtime.deadline import Deadline, seconds
from torchft.runtime.retry import Backoff

__all__ = ["LighthouseClient"]


class LighthouseClient:
    """Connected from construction on.

    Args:
        addr: ``http://host:port`` of the lighthouse; where standbys stand by, several with commas between: the one that
            leads is asked.
        connect_timeout: how long a lighthouse that is not there yet is waited for.

    Raises:
        TimeoutError: it did not answer within ``connect_timeout``.
        ValueError: ``addr`` is not an address.
    """

    def __init__(self, addr: str, connect_timeout: timedelta) -> None:
        self._lighthouses = Lighthouses(addr)
        self._lighthouses.connect(Deadline(connect_timeout))

    def quorum(
        self,
        replica_id: str,
        timeout: timedelta,
        address: str | None = None,
        store_address: str | None = None,
        step: int | None = None,
        world_size: int | None = None,
        shrink_only: bool | None = None,
        data: dict[str, Any] | None = None,
    ) -> types.Quorum:
        """Asks for the next quorum and waits for it.

        Args:
            replica_id: of the asking replica.
            timeout: how long to wait.
            address: of its ManagerServer.
            store_address: of its store.
            step: the newest step it has committed, 0 by default.
            world_size: its ranks, 1 by default.
            shrink_only: take nobody new in.
            data: JSON-serialisable, handed to all members.

        Raises:
            TimeoutError: no quorum formed in time.
            ValueError: ``data`` is not JSON-serialisable.
            RuntimeError: any other failure.
        """
        member = pb.QuorumMember(
            replica_id=replica_id,
            address=address or "",
            store_address=store_address or "",
            step=step or 0,
            world_size=1 if world_size is None else world_size,
            shrink_only=bool(shrink_only),
            data=types.encode_data(data),
        )
        try:
            quorum = self._lighthouses.quorum(member, Deadline(timeout))
        except grpc.RpcError as e:
            raise self._translate(e, "quorum", timeout) from e
        return types.quorum_from_wire(quorum)

    def heartbeat(self, replica_id: str, timeout: timedelta = timedelta(seconds=5)) -> None:
        """One sign of life.

        Raises:
            TimeoutError, RuntimeError: it did not arrive.
        """
        try:
            request = pb.LighthouseHeartbeatRequest(replica_id=replica_id)
            self._lighthouses.call(
                lambda place, left, wait: place.lighthouse.Heartbeat(request, timeout=left), Deadline(timeout)
            )
        except grpc.RpcError as e:
            raise self._translate(e, "heartbeat", timeout) from e

    def report_failure(self, replica_id: str, cause: str, timeout: timedelta = timedelta(seconds=5)) -> bool:
        """Says that a replica is dead, for those who know: a supervisor that saw its exit code, an operator.

        Args:
            replica_id: the unique id of one life of it, ``name:uuid``.
            cause: for everybody's log, for instance ``exit code 1``.

        Returns:
            Whether it counted as alive until now.

        Raises:
            TimeoutError, RuntimeError: it did not arrive.
        """
        report = session_pb2.Report(replica_id=replica_id, cause=cause)
        try:
            answer = self._lighthouses.call(
                lambda place, left, wait: place.sessions.ReportFailure(report, timeout=left), Deadline(timeout)
            )
            return bool(answer.known)
        except grpc.RpcError as e:
            raise self._translate(e, "report_failure", timeout) from e

    def subscribe_failures(self, timeout: timedelta = timedelta(seconds=5)) -> Iterator[types.FailureNotification]:
        """The failures that the lighthouse finds from now on, as they are found.

        With several lighthouses the subscription goes on at the next leader; what happens in between is not heard of.

        Args:
            timeout: how long the subscription lasts. When it has passed, the iterator raises TimeoutError.

        Raises:
            TimeoutError: ``timeout`` passed.
            RuntimeError: the lighthouse is gone.
        """
        deadline = Deadline(timeout)
        return self._notices(self._subscribe(deadline), deadline, timeout)

    def _subscribe(self, deadline: Deadline) -> Any:
        stub = self._lighthouses.place().lighthouse
        return stub.SubscribeFailures(pb.SubscribeFailuresRequest(), timeout=deadline.remaining())

    def _notices(self, call: Any, deadline: Deadline, timeout: timedelta) -> Iterator[types.FailureNotification]:
        backoff = Backoff(0.02, 1.0)
        while True:
            address = self._lighthouses.current
            try:
                for notice in call:
                    yield types.FailureNotification(notice.replica_id, notice.error_message)
            except grpc.RpcError as e:
                lost = (
                    self._lighthouses.several and isinstance(e, grpc.Call) and e.code() == grpc.StatusCode.UNAVAILABLE
                )
                if elsewhere(e) is None and not lost:
                    raise self._translate(e, "subscribe_failures", timeout) from e
                self._lighthouses.leave(address, elsewhere(e))
            finally:
                call.cancel()
            time.sleep(min(backoff.delay(), deadline.remaining()))
            call = self._subscribe(deadline)

    def close(self) -> None:
        """Closes the connection; calls under way fail."""
        self._lighthouses.close()

    def _translate(self, error: grpc.RpcError, call: str, timeout: timedelta) -> Exception:
        return translate(
            error,
            what="lighthouse",
            address=self._lighthouses.current,
            call=call,
            timeout=seconds(timeout),
            hint=LIGHTHOUSE_HINT,
        )
