"""Counters of checkpoints on disk, in Prometheus's default registry."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

__all__ = ["FAILED", "LEFT_OUT", "NEWEST_STEP", "SAVED", "SAVED_BYTES", "SAVED_SECONDS", "WAITED_SECONDS"]

SAVED = Counter("torchft_saves", "Saves that were completed (of ranks other than 0: their parts).")
SAVED_BYTES = Counter("torchft_saved_bytes", "Bytes that they wrote.")
SAVED_SECONDS = Counter("torchft_saved_seconds", "Seconds that they took, the copy included.")
WAITED_SECONDS = Counter("torchft_save_waited_seconds", "Seconds that the training waited for the copies.")
FAILED = Counter("torchft_saves_failed", "Saves that failed.")
LEFT_OUT = Counter("torchft_saves_left_out", "Saves that were due while another one was still written.")
NEWEST_STEP = Gauge("torchft_saved_step", "Step of the newest checkpoint that this process completed.")
