"""How far a fetch is, as the log, the metrics and the decisions see it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.checkpointing.test_pg_transport import CPU, GROUP, LOCAL, TIMEOUT, groups
from torchft.checkpointing import HTTPTransport, PGTransport
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.metrics import count_whole

GB = 10**9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr("torchft.checkpointing.fetch_progress.time.monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_line_each_second_once_it_takes_longer_than_two(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    progress = FetchProgress(7)
    progress.begin(10 * GB, 0)
    with caplog.at_level("INFO"):
        for tick in range(1, 33):  # four seconds at a GB a second
            clock(0.125)
            progress.landed(GB // 8)
            progress.tell(tick * GB // 8, sources=3)
    assert len(caplog.messages) == 3
    assert caplog.messages[0].startswith(
        "receiving step 7: 2000 of 10000 MB (20 %), 0 retries, 0 bad chunks, 1.00 GB/s"
    )
    assert caplog.messages[-1].endswith("1.00 GB/s from 3 sources")


def test_seconds_left_are_those_of_the_pace_so_far(clock: Callable[[float], None]) -> None:
    progress = FetchProgress(7)
    progress.begin(10 * GB, 2 * GB)
    clock(0.01)
    assert progress.seconds_left(GB) == 0.0  # too early to say
    clock(0.99)
    assert progress.seconds_left(2 * GB) == pytest.approx(3.0)


def test_hopeless_is_what_comes_too_slowly_not_what_pauses(clock: Callable[[float], None]) -> None:
    progress = FetchProgress(7)
    progress.begin(10 * GB, 0)
    clock(5.0)
    assert not progress.hopeless(0, 10.0), "nothing came: it may pause"
    received = 0
    for _ in range(3):
        clock(0.5)
        received += GB // 2
        assert not progress.hopeless(received, 10.0), "fast enough"
    clock(0.5)
    received += 1000
    assert not progress.hopeless(received, 10.0), "one slow span"
    clock(0.5)
    assert progress.hopeless(received + 1000, 10.0)


def test_at_a_glance_far_too_slow_is_what_would_take_several_times_too_long(clock: Callable[[float], None]) -> None:
    def judged(seconds: float, per_second: int, left: float = 10.0) -> bool:
        progress = FetchProgress(7)
        progress.begin(GB, 0)
        assert not progress.far_too_slow(0, left), "nothing came: it may pause"
        clock(0.5)
        assert not progress.far_too_slow(20_000_000, left), "the first bytes were in some buffer"
        clock(seconds)
        assert not progress.far_too_slow(20_000_000, left), "it pauses"
        return progress.far_too_slow(20_000_000 + int(per_second * seconds), left)

    assert not judged(0.04, 1_000_000), "too early to say"
    assert judged(0.06, 1_000_000)
    assert not judged(0.06, 30_000_000)
    assert judged(0.26, 30_000_000)
    assert not judged(0.26, 120_000_000)


def test_a_source_that_stumbles_after_it_gave_most_is_not_given_up(clock: Callable[[float], None]) -> None:
    progress = FetchProgress(7)
    progress.begin(10 * GB, 0)
    received = 0
    for _ in range(8):
        clock(0.5)
        received += GB
        assert not progress.hopeless(received, 10.0)
    for _ in range(5):
        clock(0.5)
        received += 1000
        assert not progress.hopeless(received, 10.0), "at the pace so far the rest takes little more than a second"


def test_what_would_take_twice_as_long_as_it_may_is_given_up_unless_the_larger_part_has_come(
    clock: Callable[[float], None],
) -> None:
    def given_up_after(per_second: list[float], allowance: float) -> float | None:
        """Seconds of a gigabyte, at so many GB/s in each second and the last one from then on."""
        progress = FetchProgress(7)
        progress.begin(GB, 0)
        received, half = 0.0, 0
        while received < GB:
            clock(0.5)
            received += GB * per_second[min(half // 2, len(per_second) - 1)] / 2
            half += 1
            if progress.hopeless(int(received), 1000.0, allowance):
                return half / 2
        return None

    assert given_up_after([0.05], 2.0) == 1.0, "20 s instead of 2"
    assert given_up_after([0.26], 2.0) is None
    assert given_up_after([0.05], 11.0) is None, "measured too well, but by less than two"
    assert given_up_after([0.3, 0.3, 0.01], 2.0) is None, "the larger part is there"
    assert given_up_after([0.3, 0.01], 2.0) == 2.0, "the smaller part is"


def test_a_glance_is_for_the_first_second(clock: Callable[[float], None]) -> None:
    progress = FetchProgress(7)
    progress.begin(GB, 0)
    assert not progress.far_too_slow(1000, 2.0)
    clock(1.1)
    assert not progress.far_too_slow(2000, 2.0)


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"torchft_checkpoint_{name}") or 0.0


def test_transfers_are_counted() -> None:
    names = ("received_bytes_total", "received_seconds_total", "snapshot_bytes_total", "bad_chunks_total")
    before = {name: value(name) for name in names}
    timeout = timedelta(seconds=20)
    source: HTTPTransport[Any] = HTTPTransport(timeout, hostname="127.0.0.1")
    receiver: HTTPTransport[Any] = HTTPTransport(timeout, hostname="127.0.0.1")
    try:
        source.send_checkpoint([1], 1, {"w": torch.ones(1000)}, timeout)
        receiver.recv_checkpoint(0, source.metadata(), 1, timeout)
        source.disallow_checkpoint()
    finally:
        source.shutdown()
        receiver.shutdown()
    assert value("received_bytes_total") - before["received_bytes_total"] == 4000
    assert value("snapshot_bytes_total") - before["snapshot_bytes_total"] == 4000
    assert value("received_seconds_total") > before["received_seconds_total"]
    assert value("bad_chunks_total") == before["bad_chunks_total"]
    assert value("sources") == 1


@pytest.mark.parametrize("local_from", [LOCAL, GROUP])
def test_transfers_over_a_process_group_are_counted(local_from: int) -> None:
    names = ("received_bytes_total", "received_seconds_total", "bad_chunks_total", "bad_sources_total")
    before = {name: value(name) for name in names}
    with groups(2) as pgs, ThreadPoolExecutor(1) as pool:
        source, receiver = (PGTransport[Any](pg, TIMEOUT, CPU, local_from=local_from) for pg in pgs)
        sending = pool.submit(source.send_checkpoint, [1], 1, {"w": torch.ones(1000)}, TIMEOUT)
        receiver.recv_checkpoint(0, "<n/a>", 1, TIMEOUT)
        sending.result(60)
    assert value("received_bytes_total") - before["received_bytes_total"] == 4000
    assert value("received_seconds_total") > before["received_seconds_total"]
    assert [value(n) for n in names[2:]] == [before[n] for n in names[2:]]
    assert value("sources") == 1


def test_a_state_that_a_process_group_damages_counts_as_bad_and_not_as_received() -> None:
    before = {name: value(name) for name in ("received_bytes_total", "bad_chunks_total", "bad_sources_total")}
    count_whole(4000, bad=2)
    assert {name: value(name) - was for name, was in before.items()} == {
        "received_bytes_total": 0,
        "bad_chunks_total": 2,
        "bad_sources_total": 1,
    }
