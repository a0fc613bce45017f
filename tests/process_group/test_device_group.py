"""Groups on an accelerator, with gloo in the device's place: what is asked of the device is faked, the rest is real."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from torchft.process_group import ProcessGroup, ProcessGroupError, ProcessGroupNCCL, nccl
from torchft.process_group.backend import torch_group
from torchft.process_group.device_group import NEVER, DeviceProcessGroup
from torchft.process_group.session import Session
from torchft.process_group.stream_watch import StreamWatch
from torchft.testing.process_group_suite import each
from torchft.testing.wait import wait_until


class Event:
    """Of a device that reaches it when a test says so."""

    def __init__(self, reached: bool = True) -> None:
        self.reached = reached

    def query(self) -> bool:
        return self.reached


class Device:
    """What of ``torch.cuda`` is used."""

    reached = True

    @staticmethod
    def set_device(index: int) -> None: ...

    @staticmethod
    def current_device() -> int:
        return 0


class OverGloo(DeviceProcessGroup):
    _module = Device

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout)
        self.torn_down = threading.Event()
        self.marked: list[Event] = []

    def _mark(self) -> Event:
        self.marked.append(Event(Device.reached))
        return self.marked[-1]

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        assert session.store is not None
        backend = dist.ProcessGroupGloo(session.store, rank, world_size, timedelta(seconds=20))
        self._watch_device(session, self.torn_down.set)
        return torch_group(backend, dist.ProcessGroup.BackendType.GLOO, "cpu", rank, world_size)


@pytest.fixture
def meet() -> Iterator[Callable[..., list[OverGloo]]]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups: list[OverGloo] = []

    def make(timeout: float) -> list[OverGloo]:
        groups.extend(OverGloo(timedelta(seconds=30)) for _ in range(2))
        each(list(groups), lambda rank, pg: pg.configure(f"127.0.0.1:{server.port}/x", f"r{rank}", rank, 2))
        for pg in groups:
            pg.set_timeout(timedelta(seconds=timeout))
        return groups

    yield make
    for pg in groups:
        pg.shutdown()


def test_a_collective_that_runs_too_long_on_the_device_ends_its_session(
    meet: Callable[..., list[OverGloo]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHFT_FLIGHT_RECORDER", str(tmp_path / "trace-"))
    pg, other = meet(0.2)
    pg.allreduce([torch.ones(1)])
    assert pg.torn_down.wait(30)
    assert "allreduce of rank 0 of 2" in str(pg.errored())
    assert "runs on the device for longer than 0.2 s" in str(pg.errored())
    with pytest.raises(ProcessGroupError, match="until it is configured again"):
        pg.allreduce([torch.ones(1)])
    assert not other.torn_down.is_set()
    assert "version" in json.loads((tmp_path / "trace-0").read_text())  # what torch's flight recorder knows


def test_what_waits_behind_other_work_of_the_stream_is_not_late(
    meet: Callable[..., list[OverGloo]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "reached", False)  # the device still computes
    pg, other = meet(0.1)
    works = [pg.allreduce([torch.ones(1)])]
    assert not pg.torn_down.wait(0.5)
    assert pg.errored() is None
    works.append(other.allreduce([torch.ones(1)]))
    for work in works:
        work.wait()
    assert pg.errored() is None
    pg.allreduce([torch.ones(1)])
    pg.marked[-1].reached = True  # now it reaches a collective to which the other never comes
    assert pg.torn_down.wait(30)


def test_an_abort_returns_while_the_backend_is_still_torn_down(meet: Callable[..., list[OverGloo]]) -> None:
    pg, _ = meet(20)
    released = threading.Event()
    cut: Any = pg._session.cut if pg._session is not None else None
    begun = threading.Event()
    cut._tear_down = lambda: (begun.set(), released.wait(30))
    pg.abort()
    assert begun.wait(30)
    assert "aborted" in str(pg.errored())
    pg.abort()
    released.set()


def test_a_watch_counts_from_when_the_device_is_there_and_tells_the_first_that_is_late() -> None:
    now = [0.0]
    watch = StreamWatch(lambda error: None, clock=lambda: now[0])
    first, second = Event(reached=False), Event()
    done: set[str] = set()
    watch._thread = threading.current_thread()  # the test looks
    watch.watch("first", first, lambda: "first" in done, 5.0)
    watch.watch("second", second, lambda: "second" in done, 5.0)
    assert watch.look() is None
    now[0] = 4.0
    done.add("second")
    first.reached = True
    assert watch.look() is None
    now[0] = 9.0
    assert watch.look() is None
    now[0] = 9.1
    error = watch.look()
    assert str(error) == "first runs on the device for longer than 5 s"
    assert watch.look() is None  # told once


def test_a_watch_tells_what_a_collective_failed_with() -> None:
    told: list[Exception] = []
    over = threading.Event()

    def tell(error: Exception) -> None:
        told.append(error)
        over.set()

    def fail() -> bool:
        raise RuntimeError("a member is gone")

    StreamWatch(tell).watch("it", Event(), fail, 5.0)
    assert over.wait(30)
    assert [str(e) for e in told] == ["a member is gone"]


def test_a_watch_with_nothing_to_watch_has_no_thread() -> None:
    before = set(threading.enumerate())
    watch = StreamWatch(lambda error: None)
    watch.watch("it", Event(), lambda: True, 0.1)

    def left() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and t.name == "torchft-stream-watch"]

    wait_until(lambda: watch._thread is None and not left(), what="the end of its thread")


def test_nccl_is_told_to_leave_errors_and_timeouts_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Options:
        def __init__(self) -> None:
            self.config = type("Config", (), {})()

    class Backend:
        Options: Any = None

        def __init__(self, store: object, rank: int, world_size: int, options: Any) -> None:
            seen["handling"] = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
            seen["timeout"] = options._timeout
            seen["blocking"] = options.config.blocking
            seen["ranks"] = options.global_ranks_in_group

        def abort(self) -> None:
            seen["aborted"] = threading.current_thread() is not threading.main_thread()
            torn_down.set()

    torn_down = threading.Event()
    Backend.Options = Options
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Backend, raising=False)
    monkeypatch.setattr(nccl, "torch_group", lambda *args: "a group")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    session = Session("the session", alone=False)
    session.store = object()  # type: ignore[assignment]
    session.aborted.set()  # so that it goes no further than that
    pg = ProcessGroupNCCL.__new__(ProcessGroupNCCL)
    ProcessGroup.__init__(pg)
    with pytest.raises(ProcessGroupError, match="was aborted before it met"):
        pg._open(session, 0, 2, timedelta(seconds=5), [4, 7])
    assert torn_down.wait(30)
    assert seen == {"handling": "0", "timeout": NEVER, "blocking": 0, "ranks": [4, 7], "aborted": True}
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
