"""Sources that give nothing are asked whether they have the same state: who differs is named, who is silent no matter.

The sources are in this process. What is not there in time is not compared, so the times are made long: on a busy
machine as on an idle one, everybody who can answer has answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from tests.checkpointing.hostile_server import HostileServer
from tests.checkpointing.loopback import TIMEOUT, address_of, offered, transport
from torchft.checkpointing import chunks, http_agreement, http_comparison, http_differences, http_download
from torchft.checkpointing.chunks import Sample
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_comparison import Comparing, Comparison
from torchft.checkpointing.http_discovery import Discovery
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.offer import Offer
from torchft.runtime.deadline import Deadline
from torchft.testing.faults import Link
from torchft.testing.wait import wait_until

STEP = 4
CHUNK = 1 << 20
"""Bytes, of so small a state."""


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assigned source is enough, and whoever answers is in time."""
    limits = "http_download._SOON", "http_download._PATIENCE", "http_agreement._SILENT", "fetch_progress._FIRST"
    for limit in limits:
        monkeypatch.setattr(f"torchft.checkpointing.{limit}", 60.0)
    for limit in ("_MOMENT", "_MOMENT_FOR_ALL"):
        monkeypatch.setattr(http_comparison, limit, 60.0)


@pytest.fixture(autouse=True)
def small_states_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_WHOLE", CHUNK)


def state(chunks: int = 1, **more: Any) -> dict[str, Any]:
    return {"w": torch.arange(chunks * CHUNK // 8), "lr": 0.1, **more}


def corrupt(good: dict[str, Any]) -> dict[str, Any]:
    """The same, but for a bit in the last chunk."""
    bad = good["w"].clone()
    bad[-1] ^= 1
    return good | {"w": bad}


class Fetch:
    """Sources that offer one state each, and a receiver."""

    def __init__(self, stack: ExitStack, states: list[dict[str, Any]], compare: Comparing) -> None:
        self.sources = [stack.enter_context(transport(snapshot="lock")) for _ in states]
        for source, one in zip(self.sources, states, strict=True):
            source.send_checkpoint([9], STEP, one, TIMEOUT)
        self.live = {"w": torch.zeros_like(states[0]["w"])}
        self.receiver = stack.enter_context(transport(state_dict=lambda: self.live, compare_sources=compare))
        self.metadata = [(rank, source.metadata()) for rank, source in enumerate(self.sources)]

    def receive(self) -> dict[str, Any]:
        received = self.receiver.recv_from_many(self.metadata, STEP, TIMEOUT)
        assert received["w"] is self.live["w"]
        return received

    @property
    def progress(self) -> FetchProgress:
        assert self.receiver.last_receive is not None
        return self.receiver.last_receive


def told(caplog: pytest.LogCaptureFixture, level: str = "WARNING") -> list[str]:
    """All lines of this level, and there are none that are graver."""
    grave = [r for r in caplog.records if r.levelname in ("WARNING", "ERROR", "CRITICAL")]
    assert {r.levelname for r in grave} <= {level}
    return [r.getMessage() for r in grave]


@contextmanager
def fetch(*states: dict[str, Any], compare: Comparing = "sample") -> Iterator[Fetch]:
    with ExitStack() as stack:
        yield Fetch(stack, list(states), compare)


def assert_same(received: dict[str, Any], expected: dict[str, Any]) -> None:
    assert received.keys() == expected.keys()
    assert torch.equal(received["w"], expected["w"])
    assert received["lr"] == expected["lr"]


# --------------------------------------------------------------- who differs


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("compare", ["sample", "all"])
def test_assigned_source_that_is_silently_corrupt_is_outvoted(
    compare: Comparing, caplog: pytest.LogCaptureFixture
) -> None:
    good = state(2)
    with fetch(corrupt(good), good, good, compare=compare) as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == ["replica rank 0"]
        assert "replica rank 0" in caplog.text
        assert "silent corruption" in caplog.text


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("compare", ["sample", "all"])
def test_source_that_gives_nothing_and_is_silently_corrupt_is_named(
    compare: Comparing, caplog: pytest.LogCaptureFixture
) -> None:
    good = state(2)
    with fetch(good, good, corrupt(good), compare=compare) as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == ["replica rank 2"]
        assert "silent corruption" in caplog.text


@pytest.mark.usefixtures("patient")
def test_of_two_sources_that_differ_nobody_is_accused_and_it_is_said_once_in_what(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = state(2, mean=torch.zeros(4), var=torch.ones(4))
    own = good | {"mean": torch.ones(4)}
    with fetch(good, own) as f:
        for _ in range(2):
            assert_same(f.receive(), good)
            assert f.progress.bad_sources == ["replica rank 1"], "it is not used"
        (line,) = told(caplog)
        assert line.startswith("step 4: replica rank 0 (")
        assert " and replica rank 1 (" in line
        assert "They differ in state['mean']. " in line
        assert "alike=False" in line
        assert "silent corruption" in line
        assert "The state of replica rank 0 is taken" in line
        f.sources[1].send_checkpoint([9], STEP, corrupt(own), TIMEOUT)
        assert_same(f.receive(), good)
        assert "They differ in state['w'], state['mean']. " in told(caplog)[1], "that is new"


@pytest.mark.usefixtures("patient")
def test_where_it_cannot_be_looked_at_what_differs_all_tensors_that_lie_there_are_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_differences, "_LOOK", 0.0)
    good = state(2, mean=torch.zeros(4), var=torch.ones(4))
    with fetch(good, good | {"mean": torch.ones(4)}) as f:
        assert_same(f.receive(), good)
        (line,) = told(caplog)
        assert "state['mean'], state['var'] (or in some of these, which lie in 1 of 3 chunks)" in line


@pytest.mark.usefixtures("patient")
def test_sources_that_differ_and_do_not_tell_their_hashes_do_not_keep_the_state_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(http_agreement, "_ALL_SILENT", 0.1)
    monkeypatch.setattr(Offer, "await_seal", lambda *_: (over.wait(60), None)[1])
    good = state()
    with fetch(good, corrupt(good)) as f:
        try:
            assert_same(f.receive(), good)
        finally:
            over.set()
        (line,) = told(caplog)
        assert "no source of step 4 told its hashes" in line
        assert "replica rank 0 (" in line


@pytest.mark.usefixtures("patient")
def test_of_three_sources_that_all_differ_nobody_is_accused(caplog: pytest.LogCaptureFixture) -> None:
    states = [state(mean=torch.full((4,), float(i))) for i in range(3)]
    with fetch(*states) as f:
        assert_same(f.receive(), states[0])
        (line,) = told(caplog)
        assert all(f"replica rank {i} (" in line for i in range(3))


@pytest.mark.usefixtures("patient")
def test_a_single_corrupt_chunk_is_found_where_all_are_compared() -> None:
    good = state(10)
    with fetch(good, corrupt(good), good, compare="all") as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == ["replica rank 1"]
        assert f.progress.compared == 2


@pytest.mark.usefixtures("patient")
def test_assigned_source_with_another_tree_is_outvoted_and_the_state_taken_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = state(2)
    with fetch(good | {"lr": 0.2}, good, good) as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == ["replica rank 0"]
        assert "replica rank 0" in caplog.text
        assert "another tree or layout" in caplog.text


@pytest.mark.usefixtures("patient")
def test_third_source_with_another_tree_is_named(caplog: pytest.LogCaptureFixture) -> None:
    good = state()
    with fetch(good, good, state(2, lr=0.2)) as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == ["replica rank 2"]
        (line,) = told(caplog, "ERROR")
        assert line.startswith("replica rank 2 (")
        assert "silent corruption" in line


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("alone", [True, False], ids=["compared", "engaged"])
def test_of_two_sources_with_different_trees_nobody_is_accused_and_what_differs_is_named(
    alone: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not alone:
        monkeypatch.setattr("torchft.checkpointing.http_download._PATIENCE", 0.0)
        monkeypatch.setattr("torchft.checkpointing.http_download._SOON", -1.0)
    good = state()
    with fetch(good, good | {"lr": 0.2, "more": 1}) as f:
        received = f.receive()
        (line,) = told(caplog)
        believed = 0 if received["lr"] == 0.1 else 1
        assert f"The state of replica rank {believed} is taken" in line
        assert "They differ in state['lr'], state['more']. " in line


@pytest.mark.usefixtures("patient")
def test_sources_that_agree_are_all_compared_and_nobody_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_comparison, "_SAMPLE", 3 * CHUNK)
    good = state(10)
    with caplog.at_level("INFO"), fetch(good, good, good) as f:
        assert_same(f.receive(), good)
        assert f.progress.compared == 2
        assert f.progress.sources == 1
        assert not f.progress.bad_sources
        assert "2 of 2 further sources were compared" in caplog.text
        for source in f.sources[1:]:
            hashed = sum(offered(source).digest_of(i) is not None for i in range(10))
            assert hashed == 3, "more was hashed than was asked for"
            assert offered(source).bytes_sent == 0


@pytest.mark.usefixtures("patient")
def test_a_state_without_tensors_is_compared_by_its_manifest() -> None:
    with ExitStack() as stack:
        states = [{"x": 1}, {"x": 2}, {"x": 2}]
        sources = [stack.enter_context(transport()) for _ in states]
        for source, one in zip(sources, states, strict=True):
            source.send_checkpoint([9], STEP, one, TIMEOUT)
        receiver = stack.enter_context(transport())
        metadata = [(rank, source.metadata()) for rank, source in enumerate(sources)]
        assert receiver.recv_from_many(metadata, STEP, TIMEOUT) == {"x": 2}


@pytest.mark.usefixtures("patient")
def test_states_that_differ_on_purpose_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    own = state(2, lr=0.2)
    with fetch(own, corrupt(own), state(2)) as f:
        received = f.receiver.recv_from_many(f.metadata, STEP, TIMEOUT, alike=False)
        assert_same(received, own)
        assert (f.progress.compared, f.progress.bad_sources) == (0, [])
        assert not [r for r in caplog.records if r.levelname == "ERROR"]


def _all_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if the assigned source were slow, and yet the first to answer. The list tells who has answered."""
    monkeypatch.setattr(http_download, "_PATIENCE", -1.0)
    ask, first, answered = Discovery._ask_once, threading.Event(), list[int]()

    def in_turn(self: Discovery, source: HTTPSource) -> float | None:
        if source.index:
            first.wait(60)
        else:
            wait_until(lambda: all(s.state != "idle" for s in self.sources))
        try:
            return ask(self, source)
        finally:
            answered.append(source.index)
            first.set()

    monkeypatch.setattr(Discovery, "_ask_once", in_turn)
    return answered


@pytest.mark.parametrize("another_tree", [True, False])
@pytest.mark.parametrize("others_known", [False, True])
def test_of_states_that_differ_on_purpose_one_is_taken_whole_when_its_source_dies(
    another_tree: bool, others_known: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = _all_asked_at_once(monkeypatch) if others_known else None
    first, second = state(2), corrupt(state(2)) | {"lr": 0.2 if another_tree else 0.1}
    third = corrupt(corrupt(second)) | {"lr": second["lr"]}
    third["w"][0] = 5
    with fetch(first, second, third) as f:
        prepare = f.receiver._continue

        def lose(*what: Any) -> Any:  # when the first one's manifest is there, and nothing else of it
            if answered is not None:
                wait_until(lambda: len(answered) >= 3)
            f.sources[0].shutdown()
            return prepare(*what)

        monkeypatch.setattr(f.receiver, "_continue", lose)
        received = f.receiver.recv_from_many(f.metadata, STEP, TIMEOUT, alike=False)
        assert any(received["lr"] == s["lr"] and torch.equal(received["w"], s["w"]) for s in (second, third))
        assert f.progress.bad_sources == []
        assert not [r for r in caplog.records if r.levelname == "ERROR"]


# ------------------------------------------------------------ who does not say


def test_one_source_alone_and_sources_that_are_not_to_be_compared_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    def ask(*_: object) -> Sample:
        raise AssertionError("it was asked")

    monkeypatch.setattr(Comparison, "ask", ask)
    good = state()
    with fetch(good) as f:
        assert_same(f.receive(), good)
    with fetch(good, good, compare="none") as f:
        assert_same(f.receive(), good)
        assert f.progress.compared == 0
        assert offered(f.sources[1]).digest_of(0) is None


def _cut_off(stack: ExitStack, f: Fetch) -> str:
    link = stack.enter_context(Link(address_of(f.sources[1])))
    link.block()
    return f"torchft-http/1 http://{link.address}"


def _dead(stack: ExitStack, f: Fetch) -> str:
    f.sources[1].shutdown()
    return f.metadata[1][1]


def _refusing(stack: ExitStack, f: Fetch) -> str:
    f.sources[1]._server.withdraw(Deadline(30))
    f.sources[1].decline(STEP, "it cannot be read")
    return f.metadata[1][1]


def _not_there_yet(stack: ExitStack, f: Fetch) -> str:
    return stack.enter_context(transport()).metadata()


def _older(stack: ExitStack, f: Fetch) -> str:
    older = HostileServer(lambda request: [b"HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nno such\n"])
    stack.callback(older.close)
    return f"torchft-http/1 http://127.0.0.1:{older.port}"


def _babbling(stack: ExitStack, f: Fetch) -> str:
    babbling = HostileServer(lambda request: [b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a": 1}\n'])
    stack.callback(babbling.close)
    return f"torchft-http/1 http://127.0.0.1:{babbling.port}"


@pytest.mark.parametrize("compare", ["sample", "all"])
@pytest.mark.parametrize("make", [_cut_off, _dead, _refusing, _not_there_yet, _older, _babbling])
def test_a_source_that_cannot_be_compared_is_no_matter(
    make: Callable[[ExitStack, Fetch], str], compare: Comparing, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_SOON", "_PATIENCE"):  # it is not needed for the data
        monkeypatch.setattr(f"torchft.checkpointing.http_download.{limit}", 60.0)
    monkeypatch.setattr(http_comparison, "_MOMENT_FOR_ALL", 0.05)
    good = state()
    with ExitStack() as stack:
        f = stack.enter_context(fetch(good, good, compare=compare))
        f.metadata[1] = 1, make(stack, f)
        assert_same(f.receive(), good)
        assert f.progress.compared == 0
        assert not f.progress.bad_sources
