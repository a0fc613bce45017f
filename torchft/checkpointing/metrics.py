"""Counters of the state transfers of a process, whichever transport moves them, in Prometheus's default registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from torchft.checkpointing.fetch_progress import FetchProgress

__all__ = [
    "BAD_CHUNKS",
    "BAD_SOURCES",
    "KEPT_BYTES",
    "RECEIVED_BYTES",
    "RECEIVED_SECONDS",
    "RETRIES",
    "SNAPSHOT_BYTES",
    "SNAPSHOT_SECONDS",
    "SOURCES",
    "count",
    "count_whole",
]

RECEIVED_BYTES = Counter("torchft_checkpoint_received_bytes", "Bytes of states received and verified.")
RECEIVED_SECONDS = Counter("torchft_checkpoint_received_seconds", "Seconds that receives took which succeeded.")
KEPT_BYTES = Counter("torchft_checkpoint_kept_bytes", "Bytes that a receive took over from one that had failed.")
RETRIES = Counter("torchft_checkpoint_retries", "Connections to sources that were lost or given up, and made anew.")
BAD_CHUNKS = Counter("torchft_checkpoint_bad_chunks", "Chunks that arrived without the hash that was announced.")
BAD_SOURCES = Counter("torchft_checkpoint_bad_sources", "Sources that differed from the others or sent bad bytes.")
SOURCES = Gauge("torchft_checkpoint_sources", "Sources that the newest receive took data from.")
SNAPSHOT_BYTES = Counter("torchft_checkpoint_snapshot_bytes", "Bytes copied so that others can read them.")
SNAPSHOT_SECONDS = Counter("torchft_checkpoint_snapshot_seconds", "Seconds that this copying took.")


def count_whole(nbytes: int, bad: int = 0) -> None:
    """A state came from one source and was verified as a whole.

    Args:
        nbytes: of the state.
        bad: chunks that were not what was announced; if there are any, nothing counts as received.
    """
    RECEIVED_BYTES.inc(0 if bad else nbytes)
    BAD_CHUNKS.inc(bad)
    BAD_SOURCES.inc(bool(bad))
    SOURCES.set(1)


def count(progress: FetchProgress) -> None:
    """A fetch over HTTP is over, well or not."""
    RECEIVED_BYTES.inc(max(0, progress.done - progress.kept))
    KEPT_BYTES.inc(progress.kept)
    RETRIES.inc(progress.retries + len(progress.taken_over))
    BAD_CHUNKS.inc(progress.bad)
    BAD_SOURCES.inc(len(progress.bad_sources))
    SOURCES.set(progress.sources)
