"""How fast a source can be reached, measured without a state, and without anybody's waiting for it.

The idea
    ``GET /probe/{bytes}`` is answered with so many bytes that mean nothing, whatever the source does at that moment.
    The receiver reads them for at most :data:`SPAN` seconds and looks at the second half of that time: a connection
    over a long way begins slowly, and what buffers hold comes at once.

Rules
    - Bounded at both ends: at most :data:`MAX_PROBE` bytes from a constant piece of memory, one connection a source.
    - Sources are measured at the same time, since a transfer takes from all of them at the same time.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence

from torchft.checkpointing.http_wire import HeadReader, set_timeout
from torchft.checkpointing.transport import CheckpointTimeout
from torchft.runtime.deadline import Deadline

__all__ = ["MAX_PROBE", "SPAN", "noise", "rate_of", "sample", "sum_of_rates"]

MAX_PROBE = 16 << 20
"""Bytes of one probe at most: 8 ms of a path that is as fast as memory."""
SPAN = 1.0
"""Seconds that a probe is read at most."""
_BUFFER = 256 << 10
_noise = os.urandom(64 << 10)  # not zeros, which something on the way may compress


def noise(nbytes: int) -> list[memoryview]:
    """Bytes that mean nothing, as views of one small piece of memory."""
    whole, rest = divmod(nbytes, len(_noise))
    view = memoryview(_noise)
    return [view] * whole + ([view[:rest]] if rest else [])


def sample(sock: socket.socket, reader: HeadReader, length: int, span: float = SPAN) -> list[tuple[float, int]]:
    """Reads a probe's body; when what had come: seconds and bytes, from the beginning to the end.

    Args:
        sock: its head has been read.
        reader: of the heads; it may hold the first bytes.
        length: of the body.
        span: seconds after which the rest is left.

    Raises:
        OSError: the connection was lost.
    """
    scratch = memoryview(bytearray(min(length, _BUFFER)))
    began, deadline = time.monotonic(), Deadline(span)
    came = [(0.0, 0)]
    got = 0
    while got < length:
        room = scratch[: length - got]
        now = reader.take([room])
        if not now:
            try:
                set_timeout(sock, deadline)
                now = sock.recv_into(room)
            except (BlockingIOError, TimeoutError):
                break
            if not now:
                raise ConnectionError("the connection was closed in the middle of a probe")
        got += now
        came.append((time.monotonic() - began, got))
    if got < length:
        came.append((time.monotonic() - began, got))
    return came


def rate_of(came: Sequence[tuple[float, int]]) -> float:
    """Bytes a second in the second half of the time."""
    end, got = came[-1]
    since, before = max((c for c in came if c[0] <= end / 2), default=(0.0, 0))
    return (got - before) / max(end - since, 1e-6)


def sum_of_rates(probes: Sequence[Callable[[], float]], limit: float) -> float:
    """What all probes measure together, made at the same time on threads of their own.

    Args:
        probes: each returns its rate, or raises.
        limit: seconds, within which each of them ends.

    Raises:
        Exception: the first one's reason, if all fail.
    """
    rates: list[float] = []
    failures: list[Exception] = []

    def run(probe: Callable[[], float]) -> None:
        try:
            rates.append(probe())
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=run, args=(p,), name="torchft-http-probe", daemon=True) for p in probes]
    deadline = Deadline(limit)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline.remaining())
    if not rates:
        raise failures[0] if failures else CheckpointTimeout(f"no source answered a probe within {limit:g}s")
    return sum(rates)
