"""What a transfer that lost somebody leaves behind: nothing, and it needs no cycle collector for that."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpointing.loopback import TIMEOUT, address_of, transport
from torchft.checkpointing import CheckpointError, PGTransport, http_transport, pg_transport
from torchft.checkpointing.http_download import Download
from torchft.checkpointing.live import look_at
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until
from torchft.training_thread import TrainingThread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    logging.disable()  # pytest keeps what is logged, and with it exceptions and their frames
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


class Made:
    """Whatever of a class is made from here on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        real = getattr(module, name)
        self._all: list[weakref.ref[Any]] = []

        def make(*args: Any, **kwargs: Any) -> Any:
            one = real(*args, **kwargs)
            self._all.append(weakref.ref(one))
            return one

        monkeypatch.setattr(module, name, make)

    def assert_freed(self) -> None:
        assert self._all, "none was made"
        wait_until(
            lambda: not any(ref() for ref in self._all), what="that nothing is left"
        )  # threads end by themselves


def test_http_receive_that_lost_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, destinations = (Made(monkeypatch, http_transport, name) for name in ("Download", "Destination"))
    state = {"w": torch.randint(0, 256, (32 << 20,), dtype=torch.uint8)}
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(transport())
        links = []
        for _ in range(2):
            source = stack.enter_context(transport(snapshot="lock"))
            source.send_checkpoint([1], 4, state, TIMEOUT)
            links.append(stack.enter_context(Link(address_of(source))))
            links[-1].throttle(40e6)
        sources = [(rank, f"torchft-http/1 http://{link.address}") for rank, link in enumerate(links)]

        landed, lost = Download._landed, threading.Event()

        def lose(download: Download, *args: Any) -> bool:
            if not download.progress.done:  # it is the first chunk of sixteen
                links[0].refuse()
                links[0].cut()
                lost.set()
            return landed(download, *args)

        monkeypatch.setattr(Download, "_landed", lose)
        assert torch.equal(receiver.recv_from_many(sources, 4, TIMEOUT)["w"], state["w"])
        assert lost.is_set()
        downloads.assert_freed()
        destinations.assert_freed()


@pytest.mark.parametrize("member", ["source", "receiver"])
def test_transfer_by_a_process_group_that_is_aborted(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    links = Made(monkeypatch, pg_transport, "Link")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups = [ProcessGroupGloo(timedelta(seconds=60)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: groups[i].configure(f"127.0.0.1:{store.port}/pg", f"r{i}", i, 2), range(2)))
        mine = 0 if member == "source" else 1
        one: PGTransport[Any] = PGTransport(groups[mine], TIMEOUT, CPU)

        def take_part() -> None:
            with contextlib.suppress(CheckpointError):  # the other one does not
                if member == "source":
                    one.send_checkpoint([1], 7, {"w": torch.ones(8 << 20)}, TIMEOUT)
                else:
                    one.recv_checkpoint(0, "<n/a>", 7, TIMEOUT)
                raise AssertionError("it was aborted")

        running = pool.submit(take_part)
        wait_until(lambda: bool(one._running._running), what="that it runs")
        one.abort("a member died")
        groups[mine].abort()
        running.result(50)
    links.assert_freed()
    for group in groups:
        group.shutdown()


class Large:
    """Something that a function holds when it raises."""


class Raising:
    """A state dict function that raises."""

    def __init__(self) -> None:
        self.held: list[weakref.ref[Large]] = []

    def __call__(self) -> object:
        large = Large()
        self.held.append(weakref.ref(large))
        raise OSError("the file is gone")

    def assert_freed(self) -> None:
        assert [ref() for ref in self.held] == [None]


@pytest.mark.parametrize("heard", [True, False])
def test_state_function_that_raises_at_the_receiver(heard: bool) -> None:
    save = Raising()
    live = look_at(save)
    if heard:
        with contextlib.suppress(OSError):
            live()
    del live
    save.assert_freed()


def test_state_function_that_raises_on_the_training_thread() -> None:
    save, thread, over = Raising(), TrainingThread(), Future[None]()
    thread.begin()

    def ask() -> None:
        with contextlib.suppress(OSError):
            thread.call(save, 30.0)
        over.set_result(None)

    asking = threading.Thread(target=ask)
    asking.start()
    thread.wait(over, collective=True)
    asking.join()
    save.assert_freed()
