"""What torch's flight recorder knows of the collectives, written down when they failed.

The idea
    torch keeps a ring of the last collectives of each rank (with ``TORCH_FR_BUFFER_SIZE`` set, in older versions
    ``TORCH_NCCL_TRACE_BUFFER_SIZE``; else it keeps nothing). When a collective hangs, the ranks' rings side by side say
    who was where. So the ring is written before the communicators are torn down, in JSON, to the file named by
    ``TORCHFT_FLIGHT_RECORDER`` and the rank.

Rules: it is best effort. Writing never raises, is done at most once a session, and is skipped where torch offers
nothing.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from torchft import config

__all__ = ["dump"]

logger = logging.getLogger(__name__)

_PROBES = ("_dump_nccl_trace_json", "_dump_fr_trace_json")


def dump(name: str, rank: int) -> Path | None:
    """Writes the ring to a file.

    Args:
        name: of the session, for the log.
        rank: of this process in its default group where it has one, for the file's name.

    Returns:
        The file; None: there was nothing to write, or it could not be written.
    """
    prefix = config.FLIGHT_RECORDER.read()
    if not prefix:
        return None
    try:
        record = _record()
        if not record:
            return None
        path = Path(f"{prefix}{rank}")
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_bytes(record)
        partial.replace(path)
    except Exception as e:
        logger.warning("%s: the flight recorder could not be written: %s", name, e)
        return None
    logger.warning("%s: the flight recorder's collectives are in %s", name, path)
    return path


def _record() -> bytes | None:
    c10d = torch._C._distributed_c10d
    for probe in _PROBES:
        function = getattr(c10d, probe, None)
        if function is not None:
            record = function(includeCollectives=True, onlyActive=False)
            return record.encode() if isinstance(record, str) else bytes(record)
    return None
