"""The lighthouse: who is in the quorum, and who has died (docs/protocol.md).

The server and its life; what it does is in :mod:`torchft.coordination.lighthouse_service`. On disk it keeps an epoch
at most (:mod:`torchft.coordination.record`). It imports no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import os

from torchft.coordination.election import Alone, Shared
from torchft.coordination.etcd import EtcdRegister
from torchft.coordination.lighthouse_service import Counters, LighthouseService
from torchft.coordination.record import StateFile
from torchft.coordination.server import GrpcServer
from torchft.core.election import LeaseOptions
from torchft.core.membership import Options
from torchft.runtime import loop
from torchft.runtime.net import advertised_host, format_address

__all__ = ["LighthouseServer"]

logger = logging.getLogger(__name__)


class LighthouseServer:
    """A lighthouse in this process, on the background loop. It serves from construction until ``shutdown``.

    Args:
        bind: ``host:port`` to listen on; ``[::]:0`` takes any free port.
        min_replicas: no quorum has fewer members.
        join_timeout_ms: how long a quorum that could form waits for healthy replicas that have not asked yet.
        quorum_tick_ms: how often time-dependent rules are looked at.
        heartbeat_timeout_ms: a replica silent for longer is no longer healthy. One whose process is seen to end is
            not waited for that long.
        failure_tick_ms: how often the failures found are sent to subscribers at the latest.
        state_file: remembers which quorum ids were used, across restarts. None: ids begin at 1 each time.
        ha: ``etcd://host:port[,host:port][/job]``: this is one of several lighthouses of the job, which elect there the
            one that leads. It remembers the ids, too. See docs/high_availability.md.
        ha_lease_ms: how long a leader that is no longer heard of keeps the others from leading.
        forget: the id of a quorum, as the log names it: an operator says that its members are gone. If it is the last
            one that the record knows, those of them that cannot be reached are not waited for.

    Raises:
        RuntimeError: the port is taken, the state file cannot be used, or etcd's client is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        bind: str,
        min_replicas: int,
        join_timeout_ms: int = 100,
        quorum_tick_ms: int = 100,
        heartbeat_timeout_ms: int = 5000,
        failure_tick_ms: int = 1000,
        *,
        state_file: str | os.PathLike[str] | None = None,
        ha: str | None = None,
        ha_lease_ms: int = 5000,
        forget: int | None = None,
    ) -> None:
        if quorum_tick_ms <= 0 or failure_tick_ms <= 0:
            raise ValueError("quorum_tick_ms and failure_tick_ms must be positive")
        options = Options(min_replicas, join_timeout_ms / 1000, heartbeat_timeout_ms / 1000)
        if ha is not None and state_file is not None:
            raise ValueError("with ha= etcd remembers the epochs: leave state_file= away")
        if forget is not None and ha is None and state_file is None:
            raise ValueError("forget= needs a record of quorums to forget: state_file= or ha=")
        self._service = LighthouseService(options, min(quorum_tick_ms, failure_tick_ms) / 1000, forget)
        self._seat = self._sit(state_file, ha, LeaseOptions(ha_lease_ms / 1000))
        try:
            self._server = GrpcServer(bind, self._service.register, "lighthouse", options.heartbeat_timeout)
        except BaseException:
            self._seat.close()
            raise
        host = self._server.bound_host or advertised_host()
        self._address = format_address(host, self._server.port)
        self._ticker = loop.submit(self._service.run())
        logger.info("lighthouse listens on %s, min_replicas=%d", self._address, min_replicas)
        if isinstance(self._seat, Shared):
            self._seat.start(self._address)

    def _sit(self, state_file: str | os.PathLike[str] | None, ha: str | None, lease: LeaseOptions) -> Alone | Shared:
        if ha is not None:
            shared = self._service.seat = Shared(EtcdRegister(ha, lease), lease, self._service)
            return shared
        record = None if state_file is None else StateFile(state_file)
        try:
            alone = self._service.seat = Alone(record, self._service)
            alone.start()
            return alone
        except BaseException:
            if record is not None:
                record.close()
            raise

    def address(self) -> str:
        """``http://host:port`` for clients."""
        return self._address

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def epoch(self) -> int:
        """Of its reign; 0: it has none, or keeps no record."""
        return self._seat.epoch

    @property
    def counters(self) -> Counters:
        """What it has done so far."""
        return dataclasses.replace(self._service.counters)

    def status(self) -> str:
        """Why there is, or is not yet, a quorum, in words."""
        return loop.submit(self._service.told_status()).result(timeout=10)

    def inject_failure(self, replica_id: str) -> None:
        """Declares a replica dead, as if it had been seen to die. Subscribers are told."""
        loop.submit(self._service.fail(replica_id, "failure injected")).result(timeout=10)

    def replicas(self) -> tuple[str, ...]:
        """Ids of the groups that count as alive, sorted."""
        return loop.submit(self._service.healthy()).result(timeout=10)

    def shutdown(self) -> None:
        """Stops serving; those that wait get an error. Idempotent."""
        self._ticker.cancel()
        loop.get_loop().call_soon_threadsafe(self._service.sessions.close)
        self._server.stop()
        self._seat.close()
