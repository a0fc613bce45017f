"""Background calls: in order, their errors carried, and never in the way of the exit."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from torchft.runtime.worker import Worker

ROOT = Path(__file__).parents[2]
WAIT = 60.0


def test_calls_are_carried_out_in_order_and_errors_carried() -> None:
    worker = Worker("test")
    order: list[int] = []
    futures = [worker.submit(lambda i=i: order.append(i)) for i in range(50)]  # type: ignore[misc]

    def fail() -> None:
        raise ValueError("from the worker")

    failed = worker.submit(fail)
    after = worker.submit(lambda: threading.current_thread().name)
    for future in futures:
        future.result(WAIT)
    assert order == list(range(50))
    with pytest.raises(ValueError, match="from the worker"):
        failed.result(WAIT)
    assert after.result(WAIT) == "test"
    assert worker.shutdown(WAIT)


def test_so_many_threads_work_at_the_same_time() -> None:
    worker = Worker("test", threads=3)
    together = threading.Barrier(3)
    for future in [worker.submit(lambda: together.wait(WAIT)) for _ in range(3)]:
        future.result(WAIT)
    assert worker.shutdown(WAIT)


def test_shut_down_worker_ends_what_was_submitted_and_takes_no_more() -> None:
    worker = Worker("test")
    go = threading.Event()
    first = worker.submit(lambda: go.wait(WAIT))
    second = worker.submit(lambda: "done")
    assert not worker.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        worker.submit(lambda: None)
    go.set()
    assert worker.shutdown(WAIT)
    assert worker.shutdown(WAIT)
    assert (first.result(0), second.result(0)) == (True, "done")


def test_cancelled_call_is_not_made() -> None:
    worker = Worker("test")
    go, called = threading.Event(), threading.Event()
    worker.submit(lambda: go.wait(WAIT))
    assert worker.submit(called.set).cancel()
    go.set()
    assert worker.shutdown(WAIT)
    assert not called.is_set()


def test_call_that_takes_an_hour_does_not_keep_the_process() -> None:
    code = (
        "import threading; from torchft.runtime.worker import Worker; here = threading.Event();"
        "Worker('slow').submit(lambda: (here.set(), threading.Event().wait(3600))); assert here.wait(60)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=True)
