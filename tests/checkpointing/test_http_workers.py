"""The threads that fetch chunks: when they end."""

from __future__ import annotations

import threading

from torchft.checkpointing.chunks import ByteRun, Cut
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_client import SourceConnection
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.http_threads import FetchThreads
from torchft.checkpointing.http_workers import Workers
from torchft.core.transfer_plan import TransferPlan


def test_one_that_was_taken_over_from_ends_also_where_its_work_was_done_by_then() -> None:
    def connect(_: HTTPSource) -> SourceConnection:
        raise AssertionError("nobody connects")

    source, cut = HTTPSource(0, "a", [], state="ready"), Cut(8)
    plan, progress = TransferPlan([8]), FetchProgress(1)
    threads = FetchThreads(threading.Condition())
    workers = Workers(1, cut, ByteRun([]), plan, [source], 1, connect, threads, progress, lambda *_: True)
    for name in (1, 2):
        plan.add(name, source.index)
    progress.taken_over.add(1)  # its last bytes had come already when its connection was cut
    assert workers._next(1, source) is None
    assert workers._next(2, source) is not None
