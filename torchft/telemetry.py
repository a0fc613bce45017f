"""What happens to a rank, as OpenTelemetry events: quorums, commits, failed steps, errors and heals.

The idea
    With ``TORCHFT_USE_OTEL=1`` each of these becomes a log record of OpenTelemetry with a name and attributes, and is
    sent in batches to ``OTEL_EXPORTER_OTLP_ENDPOINT`` (OTLP over HTTP, ``http://localhost:4318`` by default).
    The text log stays as it is. All other variables that OpenTelemetry knows have their effect, among them
    ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``, by which a job is told from others.

Rules
    - Nothing waits for a collector: records go to a bounded queue that a thread of OpenTelemetry empties; when it is
      full they are dropped. At the end of the program what is left has ``FLUSH_SEC`` seconds.
    - Telemetry never fails a training: without the packages a warning says what to install, and that is all.

Scopes and names
    ``torchft_quorums``: ``torchft.quorum``, ``torchft.heal``. ``torchft_commits``: ``torchft.commit``,
    ``torchft.step_failed``. ``torchft_errors``: ``torchft.error``. Each has ``torchft.replica_id``,
    ``torchft.group_rank`` and ``torchft.step``.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from torchft import config
from torchft.coordination import QuorumResult

__all__ = ["FLUSH_SEC", "RankTelemetry", "telemetry_of"]

logger = logging.getLogger(__name__)

FLUSH_SEC = 2.0
"""Seconds that the records which are not sent yet have at the end of the program."""
_INFO, _WARN = 9, 13  # of OpenTelemetry's severity numbers


def telemetry_of(replica_id: str, group_rank: int, step: Callable[[], int]) -> RankTelemetry:
    """Where this rank's events go: nowhere, unless ``TORCHFT_USE_OTEL`` is set.

    Args:
        replica_id: of the group.
        group_rank: of this process in it.
        step: asked for each event.
    """
    return RankTelemetry(_provider(os.getpid()) if config.USE_OTEL.read() else None, replica_id, group_rank, step)


class RankTelemetry:
    """The events of one rank. Every method returns at once and raises nothing.

    Args:
        provider: OpenTelemetry's LoggerProvider; None: all of it does nothing.
        replica_id, group_rank, step: as of :func:`telemetry_of`.
    """

    def __init__(self, provider: Any | None, replica_id: str, group_rank: int, step: Callable[[], int]) -> None:
        self._provider = provider
        self._who = {"torchft.replica_id": replica_id, "torchft.group_rank": group_rank}
        self._step = step

    def quorum(self, quorum: QuorumResult) -> None:
        """The members changed, and the process group was built anew."""
        self._emit(
            "torchft_quorums",
            "torchft.quorum",
            quorum_id=quorum.quorum_id,
            replica_ids=tuple(quorum.replica_ids),
            replica_rank=quorum.replica_rank,
            max_step=quorum.max_step,
            heal=quorum.heal,
        )

    def heal(self, quorum: QuorumResult, seconds: float) -> None:
        """A peer's state was received, in that time."""
        source = quorum.recover_src_replica_rank
        self._emit(
            "torchft_quorums",
            "torchft.heal",
            quorum_id=quorum.quorum_id,
            source="" if source is None else quorum.name(source),
            max_step=quorum.max_step,
            seconds=seconds,
        )

    def commit(self, participants: int, batches_committed: int) -> None:
        """A step was committed; its number is the one that comes next."""
        self._emit("torchft_commits", "torchft.commit", participants=participants, batches_committed=batches_committed)

    def step_failed(self, failures: int, cause: object) -> None:
        """A step was not committed."""
        self._emit("torchft_commits", "torchft.step_failed", _WARN, failures_in_a_row=failures, cause=str(cause))

    def error(self, error: BaseException) -> None:
        """The first error of a step."""
        attributes = {"exception.type": type(error).__name__, "exception.message": str(error)}
        self._emit("torchft_errors", "torchft.error", _WARN, **attributes)

    def _emit(self, scope: str, name: str, severity: int = _INFO, **attributes: object) -> None:
        if self._provider is None:
            return
        from opentelemetry._logs import SeverityNumber

        try:
            self._provider.get_logger(scope).emit(
                timestamp=time.time_ns(),
                severity_number=SeverityNumber(severity),
                event_name=name,
                body=name,
                attributes={
                    **self._who,
                    "torchft.step": self._step(),
                    **{k if "." in k else f"torchft.{k}": v for k, v in attributes.items()},
                },
            )
        except Exception:
            logger.debug("an event was not recorded", exc_info=True)


@functools.cache
def _provider(pid: int) -> Any:
    """One for a process; None without the packages. A forked child has threads, and so a provider, of its own."""
    try:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.resources import Resource
    except ImportError as e:
        logger.warning(
            "TORCHFT_USE_OTEL is set, but OpenTelemetry is not there (%s): pip install 'torchft[otel]'. Training goes "
            "on without it",
            e,
        )
        return None
    resource = Resource.create()
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):  # nobody named it
        resource = resource.merge(Resource({"service.name": "torchft"}))
    provider = LoggerProvider(resource, shutdown_on_exit=False)
    provider.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
    atexit.register(_flush, provider, pid)
    return provider


def _flush(provider: Any, pid: int) -> None:
    """At the end of the program; the collector may be gone, and OpenTelemetry would try for long."""
    if pid == os.getpid():
        flushing = threading.Thread(target=provider.force_flush, args=(int(FLUSH_SEC * 1000),), daemon=True)
        flushing.start()
        flushing.join(FLUSH_SEC)
