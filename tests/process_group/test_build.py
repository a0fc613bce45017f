"""An abort ends a build at once, whatever it waits for."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from tests.forked import ForkedProgram
from torchft.process_group import ProcessGroupError, ProcessGroupGloo
from torchft.process_group import build as building
from torchft.process_group.build import Build
from torchft.process_group.lost_works import Ending, LosableCollective
from torchft.process_group.sockets import device_address, pair_identifiers
from torchft.testing.process_group_member import Member
from torchft.testing.process_group_suite import each
from torchft.testing.wait import wait_until

_AT_ONCE = 15.0
"""Seconds. It takes a few milliseconds; a machine under load takes its time. The groups' timeout is 30."""

_GLOO = "torchft.process_group:ProcessGroupGloo"
_prefixes = itertools.count()


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def pg() -> Iterator[ProcessGroupGloo]:
    group = ProcessGroupGloo(timeout=timedelta(seconds=30))
    yield group
    group.shutdown()


class Configure:
    """A configure on a thread: when it ended, and how."""

    def __init__(self, pg: ProcessGroupGloo, address: str, rank: int, size: int) -> None:
        self._pg = pg
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(address, rank, size), daemon=True)
        former = pg._attempt
        self._thread.start()
        # Before that there is nothing to abort.
        wait_until(lambda: pg._attempt is not former or not self._thread.is_alive(), what="that it configures")

    def _run(self, address: str, rank: int, size: int) -> None:
        try:
            self._pg.configure(address, "r", rank, size)
        except Exception as e:
            self.error = e

    def lasts(self, seconds: float = 0.05) -> bool:
        self._thread.join(seconds)
        return self._thread.is_alive()

    def abort(self) -> float:
        """Seconds from the abort to its end."""
        begun = time.monotonic()
        self._pg.abort()
        self._thread.join(25)
        assert not self._thread.is_alive()
        return time.monotonic() - begun


def _address(store: TCPStore) -> str:
    return f"127.0.0.1:{store.port}/build/{next(_prefixes)}"


def _keys(store: TCPStore, address: str) -> PrefixStore:
    return PrefixStore(address.partition("/")[2], store)


def _pretend(published: bytes, host: str, port: int) -> bytes:
    """What a member at ``host:port`` would publish, made from what another has published."""
    (name,) = struct.unpack_from("=Q", published)
    at = 8 + name + 8 + 2
    return published[:at] + struct.pack("!H", port) + socket.inet_aton(host) + published[at + 6 :]


def _absent(store: TCPStore, address: str, rank: int, size: int) -> None:
    """All other members publish a device whose connection to ours never comes."""
    keys = _keys(store, address)
    mine = keys.get(f"0/{rank}")
    for other in range(size):
        if other != rank:
            keys.set(f"0/{other}", _pretend(mine, "127.0.0.2", 9))  # a greater host: it is the one to connect


def _serves(pg: ProcessGroupGloo, store: TCPStore) -> bool:
    """Whether the group meets another member, now."""
    other = ProcessGroupGloo(timeout=timedelta(seconds=30))
    address = _address(store)

    def act(rank: int, group: object) -> float:
        group = (pg, other)[rank]
        group.configure(address, "r", rank, 2)
        tensor = torch.ones(1)
        group.allreduce([tensor]).wait()
        return tensor.item()

    try:
        return each([pg, other], act) == [2.0, 2.0]
    finally:
        other.shutdown()


def test_the_numbers_of_pairs_are_read_and_junk_is_not(store: TCPStore, pg: ProcessGroupGloo) -> None:
    address = _address(store)
    attempt = Configure(pg, address, 1, 3)
    mine = _keys(store, address).get("0/1")
    assert device_address(mine) is not None
    assert len(set(pair_identifiers(mine, 3))) == 3
    assert pair_identifiers(mine, 4) == pair_identifiers(b"", 3) == pair_identifiers(b"\xff" * 40, 3) == []
    attempt.abort()


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (1, 3), (0, 9)])
def test_a_build_that_waits_for_connections_ends_with_an_abort(
    store: TCPStore, pg: ProcessGroupGloo, rank: int, size: int
) -> None:
    address = _address(store)
    attempt = Configure(pg, address, rank, size)
    _absent(store, address, rank, size)
    assert attempt.lasts()
    assert attempt.abort() < _AT_ONCE
    assert "aborted" in str(attempt.error)
    assert "aborted" in str(pg.errored())
    wait_until(lambda: not building._abandoned, _AT_ONCE, "the end of the build")
    assert _serves(pg, store)


def test_twenty_aborted_builds_leave_nothing_behind(store: TCPStore, pg: ProcessGroupGloo) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    assert _serves(pg, store)
    slowest, before = 0.0, (0, 0)
    for attempted in range(25):
        if attempted == 5:
            before = held()
        address = _address(store)
        attempt = Configure(pg, address, 0, 2)
        _absent(store, address, 0, 2)
        assert attempt.lasts(0.02)
        slowest = max(slowest, attempt.abort())
    assert slowest < _AT_ONCE
    wait_until(lambda: held()[0] <= before[0] + 2 and held()[1] <= before[1] + 1, 60, "the end of all threads")
    assert _serves(pg, store)


def _silent_port(below: int) -> tuple[list[socket.socket], int]:
    """A port that answers no connection request, and the sockets that keep it so. Gloo opens connections to lower
    addresses, and compares ports as they lie in memory."""
    held: list[socket.socket] = []
    while True:
        server = socket.socket()
        held.append(server)
        server.bind(("127.0.0.1", 0))
        if socket.htons(server.getsockname()[1]) < socket.htons(below):
            break
    server.listen(0)
    for _ in range(3):  # more than its queue takes
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(server.getsockname())
        held.append(client)
    return held, server.getsockname()[1]


def test_a_build_that_cannot_be_ended_is_abandoned_and_ends_by_itself(store: TCPStore) -> None:
    pg = ProcessGroupGloo(timeout=timedelta(seconds=1))  # gloo tries four times that long
    before = len(os.listdir("/proc/self/task"))
    address = _address(store)
    attempt = Configure(pg, address, 0, 2)
    mine = _keys(store, address).get("0/0")
    device = device_address(mine)
    assert device is not None
    held, port = _silent_port(device[1])
    try:
        _keys(store, address).set("0/1", _pretend(mine, "127.0.0.1", port))
        assert attempt.lasts(0.2)
        assert attempt.abort() < _AT_ONCE
        assert "aborted" in str(attempt.error)
        assert len(building._abandoned) == 1
        pg.set_timeout(timedelta(seconds=30))
        assert _serves(pg, store)
        wait_until(lambda: not building._abandoned, 60, "the end of the abandoned build")
        pg.shutdown()
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= before + 1, 60, "the end of its threads")
    finally:
        for s in held:
            s.close()


def test_a_configure_with_a_silent_member_does_not_outlive_its_timeout(store: TCPStore) -> None:
    pg = ProcessGroupGloo(timeout=timedelta(seconds=0.5))
    address = _address(store)
    attempt = Configure(pg, address, 0, 2)
    _absent(store, address, 0, 2)
    assert not attempt.lasts(30)
    assert isinstance(attempt.error, Exception)
    pg.shutdown()


def test_a_configure_that_connects_to_a_silent_store_ends_with_an_abort(store: TCPStore, pg: ProcessGroupGloo) -> None:
    held, port = _silent_port(65536 - 1)
    try:
        attempt = Configure(pg, f"127.0.0.1:{port}/x", 0, 2)
        assert attempt.lasts(0.2)
        assert attempt.abort() < _AT_ONCE
        assert "aborted" in str(attempt.error)
        assert _serves(pg, store)
    finally:
        for s in held:
            s.close()
    wait_until(lambda: not building._abandoned, 60, "the end of the abandoned build")


_STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("known", [False, True])
def test_a_configure_that_asks_a_stopped_store_ends_with_an_abort(store: TCPStore, known: bool) -> None:
    pg = ProcessGroupGloo(timeout=timedelta(seconds=3))
    child = ForkedProgram([sys.executable, "-c", _STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        if known:
            waiting = Configure(pg, f"127.0.0.1:{port}/first", 0, 2)
            assert waiting.lasts(0.2)
            waiting.abort()
        child.send_signal(signal.SIGSTOP)
        attempt = Configure(pg, f"127.0.0.1:{port}/x", 0, 2)
        assert attempt.lasts(0.2)
        attempt.abort()
        assert "aborted" in str(attempt.error), "not by its timeout"
        assert _serves(pg, store)
        wait_until(lambda: not building._abandoned, 60, "the end of the abandoned build")
        pg.shutdown()
    finally:
        child.kill()
        child.communicate(timeout=60)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_member_that_stops_after_it_said_where_it_is_holds_nobody(
    store: TCPStore, pg: ProcessGroupGloo, rank: int
) -> None:
    with ExitStack() as stack:
        stopped, next_one = (stack.enter_context(Member(_GLOO)) for _ in range(2))
        waited = 0
        for _ in range(4):  # which of the two opens the connection is a matter of port numbers
            address = _address(store)
            stopped.tell("configure_and_stop", store_addr=address, rank=1 - rank, world_size=2)
            stopped.wait_until_stopped()
            attempt = Configure(pg, address, rank, 2)
            if attempt.lasts(0.3):
                assert attempt.abort() < _AT_ONCE
                waited += attempt.error is not None  # or else it ended just before
                assert attempt.error is None or "aborted" in str(attempt.error)
            else:  # ours opened it, and the kernel of the other took it
                pending = pg.allreduce([torch.ones(1)])
                assert _seconds_to_end(pg, lambda work=pending: work.wait()) < _AT_ONCE
            address = _address(store)
            next_one.tell("configure", store_addr=address, rank=1, world_size=2)
            pg.configure(address, "r", 0, 2)
            assert next_one.answer()["error"] is None
            if waited:
                break
            stopped.kill()
            stopped = stack.enter_context(Member(_GLOO))


def _seconds_to_end(pg: ProcessGroupGloo, wait: Callable[[], object]) -> float:
    """From an abort on another thread to the failure of ``wait()``."""
    ended: list[float] = []

    def waiter() -> None:
        try:
            wait()
        except RuntimeError:
            ended.append(time.monotonic())

    thread = threading.Thread(target=waiter, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    begun = time.monotonic()
    pg.abort()
    thread.join(25)
    assert ended
    return ended[0] - begun


@pytest.mark.parametrize("way", ["wait", "future", "recv", "recv future"])
def test_a_pending_work_ends_with_an_abort_from_another_thread(store: TCPStore, pg: ProcessGroupGloo, way: str) -> None:
    other = ProcessGroupGloo(timeout=timedelta(seconds=30))
    address = _address(store)
    each([pg, other], lambda rank, _: (pg, other)[rank].configure(address, "r", rank, 2))
    work = pg.recv([torch.ones(1)], 1, 0) if "recv" in way else pg.allreduce([torch.ones(1)])
    wait = work.get_future().wait if "future" in way else work.wait
    assert _seconds_to_end(pg, wait) < _AT_ONCE
    assert "was aborted" in str(pg.errored())
    with pytest.raises(ProcessGroupError, match="aborted"):
        pg.allreduce([torch.ones(1)])
    other.shutdown()


@pytest.mark.parametrize("way", ["wait", "future"])
def test_a_receive_in_the_middle_of_a_message_ends_with_an_abort(
    store: TCPStore, pg: ProcessGroupGloo, way: str
) -> None:
    with Member(_GLOO) as sender:
        address = _address(store)
        sender.tell("configure", store_addr=address, rank=1, world_size=2)
        pg.configure(address, "r", 0, 2)
        assert sender.answer()["error"] is None
        message = torch.zeros(100_000_000)
        work = pg.recv([message], 1, 0)
        future = work.get_future() if way == "future" else None
        sender.tell("send", target=0, elements=len(message))
        wait_until(lambda: message[0].item() == 1, 30, "the message's begin")
        sender.stop()
        assert message[-1].item() == 0  # gloo has forgotten whom to tell
        assert _seconds_to_end(pg, future.wait if future is not None else work.wait) < _AT_ONCE
        assert "was aborted" in str(pg.errored())
        assert _serves(pg, store)


def test_works_that_are_lost_are_given_up() -> None:
    class Lost(torch.distributed.Work):
        def wait(self, timeout: timedelta = timedelta(0)) -> bool:
            raise RuntimeError("Operation timed out!")

        def is_completed(self) -> bool:
            return False

        def get_future(self) -> torch.futures.Future[object]:
            return backends

    backends: torch.futures.Future[object] = torch.futures.Future()
    ending = Ending()
    work = LosableCollective(Lost(), ending)
    with pytest.raises(RuntimeError, match="timed out"):
        work.wait(timedelta(milliseconds=5))
    future = work.get_future()
    assert work.get_future() is future
    assert not work.is_completed()
    ending.give_up("first")
    ending.give_up("second")
    assert work.is_completed()
    for wait in (work.wait, future.wait, LosableCollective(Lost(), ending).get_future().wait):
        with pytest.raises(RuntimeError, match="first"):
            wait()
    backends.set_result(None)  # late: it changes nothing


def test_too_many_abandoned_builds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "LIMIT", 2)
    release, dropped = threading.Event(), threading.Semaphore(0)

    def call() -> None:
        release.wait(30)

    def over() -> None:
        pass

    for _ in range(2):
        build = Build(call, over, "stuck")
        assert not build.wait(0.01)
        assert build.abandon(lambda: dropped.release())
    with pytest.raises(ProcessGroupError, match="2 aborted configurations"):
        Build(call, over, "one more")
    release.set()
    assert all(dropped.acquire(timeout=30) for _ in range(2))
    last = Build(call, over, "fine again")
    assert last.wait(30)
    assert not last.abandon(lambda: None)
