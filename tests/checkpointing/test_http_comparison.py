"""Sources that give nothing are asked whether they have the same state: who differs is named, who is silent no matter.

The sources are in this process. What is not there in time is not compared, so the times are made long: on a busy
machine as on an idle one, everybody who can answer has answered.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
import torch

from tests.checkpointing.hostile_server import HostileServer
from tests.checkpointing.loopback import TIMEOUT, address_of, port_of, transport
from torchft.checkpointing import HTTPTransport, http_comparison, offer
from torchft.checkpointing.chunks import CHUNK_SIZE, Cut, Sample, Seal, digest
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_comparison import Comparing, Comparison, Outvoted
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.offer import Offer
from torchft.checkpointing.transport import SourceLost
from torchft.runtime.deadline import Deadline
from torchft.testing.faults import Link

STEP = 4
BODY, OTHER = bytes(16), bytes([1] * 16)
CUT = Cut(3 * CHUNK_SIZE)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assigned source is enough, and whoever answers is in time."""
    limits = "http_download._SOON", "http_download._PATIENCE", "http_agreement._SILENT", "fetch_progress._FIRST"
    for limit in limits:
        monkeypatch.setattr(f"torchft.checkpointing.{limit}", 60.0)
    for limit in ("_MOMENT", "_MOMENT_FOR_ALL"):
        monkeypatch.setattr(http_comparison, limit, 60.0)


def state(chunks: int = 1, **more: Any) -> dict[str, Any]:
    return {"w": torch.arange(chunks * CHUNK_SIZE // 8), "lr": 0.1, **more}


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


@contextmanager
def fetch(*states: dict[str, Any], compare: Comparing = "sample") -> Iterator[Fetch]:
    with ExitStack() as stack:
        yield Fetch(stack, list(states), compare)


def assert_same(received: dict[str, Any], expected: dict[str, Any]) -> None:
    assert received.keys() == expected.keys()
    assert torch.equal(received["w"], expected["w"])
    assert received["lr"] == expected["lr"]


def offered(source: HTTPTransport[Any]) -> Offer:
    current = source._server.current
    assert current is not None
    return current


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
def test_of_two_sources_that_differ_both_are_named(caplog: pytest.LogCaptureFixture) -> None:
    good = state()
    with fetch(good, corrupt(good)) as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == ["replica rank 1"]
        (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert "nobody can say: replica rank 0 " in line
        assert line.startswith("replica rank 1 ")


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
@pytest.mark.parametrize("count", [2, 3])
def test_other_source_with_another_tree_is_named(count: int, caplog: pytest.LogCaptureFixture) -> None:
    good = state()
    with fetch(*[good] * (count - 1), state(2, lr=0.2)) as f:
        assert_same(f.receive(), good)
        assert f.progress.bad_sources == [f"replica rank {count - 1}"]
        (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert f"replica rank {count - 1} " in line
        assert "replica rank 0 " in line
        assert ("nobody can say" in line) == (count == 2)


@pytest.mark.usefixtures("patient")
def test_sources_that_agree_are_all_compared_and_nobody_is_named(caplog: pytest.LogCaptureFixture) -> None:
    good = state(10)
    with caplog.at_level("INFO"), fetch(good, good, good) as f:
        assert_same(f.receive(), good)
        assert f.progress.compared == 2
        assert f.progress.sources == 1
        assert not f.progress.bad_sources
        assert "2 of 2 further sources were compared" in caplog.text
        for source in f.sources[1:]:
            hashed = sum(offered(source).digest_of(i) is not None for i in range(10))
            assert hashed == http_comparison._CHUNKS, "more was hashed than was asked for"
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


@pytest.mark.parametrize("another_tree", [True, False])
def test_of_states_that_differ_on_purpose_one_is_taken_whole_when_its_source_dies(
    another_tree: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = state(2), corrupt(state(2)) | {"lr": 0.2 if another_tree else 0.1}
    third = corrupt(corrupt(second)) | {"lr": second["lr"]}
    third["w"][0] = 5
    with fetch(first, second, third) as f:
        prepare = f.receiver._continue

        def lose(*what: Any) -> Any:  # when the first one's manifest is there, and nothing else of it
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


# ----------------------------------------------------------- the source's side


def get(source: HTTPTransport[Any], what: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
    try:
        connection.request("GET", f"/checkpoint/{STEP}/{what}")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_what_is_asked_for_is_answered_and_nothing_else() -> None:
    with transport() as source:
        source.send_checkpoint([1], STEP, state(3), TIMEOUT)
        source._await_fill(Deadline(60))
        status, document = get(source, "hashes?chunks=0,2,3,99999999999")
        assert status == 200
        told = json.loads(document)
        assert told["chunk_size"] == CHUNK_SIZE
        assert len(told["chunks"]) == 44, "base64 of the hashes of chunks 0 and 2: there are no others"
        assert [offered(source).digest_of(i) is None for i in range(3)] == [False, True, False]
        assert get(source, "hashes?chunks=")[0] == 200
        many = ",".join(map(str, range(17)))
        for wrong in ("2,1", "1,1", "1,", ",1", "x", "-1", "1" * 12, many, "1;2", "1&chunks=2"):
            assert get(source, f"hashes?chunks={wrong}")[0] == 400, wrong
        for wrong in ("manifest?chunks=1", "data?chunks=1", "hashes?", "hashes?chunk=1"):
            assert get(source, wrong)[0] == 404, wrong


def test_hashes_that_are_known_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(offer, "digest", lambda views: (made.append(sum(map(len, views))), digest(views))[1])
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(2), TIMEOUT)
        made.clear()
        first = get(source, "hashes?chunks=1")
        assert get(source, "hashes?chunks=1") == first
        assert made == [CHUNK_SIZE]


class Comparer:
    """A connection that has asked for hashes alone, and stays."""

    def __init__(self, source: HTTPTransport[Any], chunks: str) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port_of(source)), 60)
        self._sock.sendall(f"GET /checkpoint/{STEP}/hashes?chunks={chunks} HTTP/1.1\r\n\r\n".encode())

    def answer(self) -> bytes:
        """What comes until it is cut off; the first piece of it, if it is not."""
        try:
            return self._sock.recv(65536)
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self._sock.close()


def test_nothing_is_copied_for_who_only_compares_and_nobody_waits_for_it() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(2), TIMEOUT)
        comparer = Comparer(source, "0")
        assert comparer.answer().startswith(b"HTTP/1.1 200")
        assert len(offered(source).readers) == 1
        assert offered(source).needed() == set()
        source.disallow_checkpoint()
        assert source._arena.nbytes == 0
        assert comparer.answer() == b"", "it is cut off"
        comparer.close()
        assert get(source, "hashes?chunks=0")[0] == 404, "refused, and told why"


def test_memory_that_is_being_hashed_for_a_comparison_is_waited_for_and_not_read_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashing, go_on, read = threading.Event(), threading.Event(), []

    def slow(views: list[memoryview]) -> bytes:
        if sum(map(len, views)) == CHUNK_SIZE:
            hashing.set()
            assert go_on.wait(60)
            read.append(digest(views))
        return digest(views)

    monkeypatch.setattr(offer, "digest", slow)
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(3), TIMEOUT)
        comparer = Comparer(source, "0,1,2")
        assert hashing.wait(60)
        stopped = threading.Event()
        stopping = threading.Thread(target=lambda: (source.disallow_checkpoint(), stopped.set()))
        stopping.start()
        assert not stopped.is_set(), "the memory is read"
        go_on.set()
        assert stopped.wait(60)
        stopping.join(60)
        assert len(read) <= 2, "it went on with a snapshot that was withdrawn"
        assert source._arena.nbytes == 0
        assert source._server.current is None
        assert comparer.answer() == b""
        comparer.close()


def test_a_reader_that_also_compares_gets_what_it_needs() -> None:
    with transport(snapshot="lock") as source:
        source.send_checkpoint([1], STEP, state(2), TIMEOUT)
        connection = HTTPConnection("127.0.0.1", port_of(source), timeout=60)
        for what in ("hashes?chunks=0", "manifest", "hashes?chunks=0"):
            connection.request("GET", f"/checkpoint/{STEP}/{what}")
            assert len(connection.getresponse().read()) > 0
        assert offered(source).needed() == {0, 1}
        source.disallow_checkpoint()
        connection.request("GET", f"/checkpoint/{STEP}/hashes?chunks=1")
        assert connection.getresponse().status == 200, "from the copy"
        connection.close()


# ------------------------------------------------------------- the judgement


class Told:
    """A fetch of which the first source is received from; the others tell layouts and hashes."""

    def __init__(self, count: int) -> None:
        self.sources = [HTTPSource(i, f"source {i}", []) for i in range(count)]
        self.sources[0].state = "ready"
        self.progress = FetchProgress(1)
        self.comparison = Comparison("sample", 1, self.progress)
        self.comparison.laid_out(self.sources[0], CUT, BODY)
        self.asked = self.comparison.next(self.sources, [])

    def tell(self, index: int, body: bytes = BODY, **chunks: bytes) -> None:
        digests = {int(k[1:]): v for k, v in chunks.items()}
        self.comparison.told(self.sources[index], Sample(CUT, body, digests))


def test_each_is_asked_once_and_who_gives_is_not_asked() -> None:
    told = Told(3)
    assert told.asked == told.sources[1:]
    assert told.comparison.next(told.sources, [told.sources[0]]) == []
    assert told.comparison.next(told.sources, [told.sources[1]]) == [told.sources[0]], "another one gives now"
    told.sources[2].state = "out"
    later = HTTPSource(3, "source 3", [])
    assert told.comparison.next([*told.sources, later], [told.sources[1]]) == [later]


def test_a_difference_is_seen_whichever_comes_first() -> None:
    told = Told(2)
    told.tell(1, _1=b"a")
    told.comparison.landed(0, b"b")
    assert not told.comparison.disputed
    told.comparison.landed(1, b"b")
    assert told.comparison.disputed
    told = Told(2)
    told.comparison.landed(1, b"b")
    told.tell(1, _1=b"a")
    assert told.comparison.disputed


def test_what_was_kept_is_compared_once_it_is_agreed_on() -> None:
    told = Told(2)
    told.tell(1, _2=b"c" * 16)
    assert not told.comparison.contradicts(Seal(CUT, b"a" * 32 + b"c" * 16, BODY))
    assert told.comparison.contradicts(Seal(CUT, b"a" * 48, BODY))


def test_answers_are_waited_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(3)
    assert told.comparison.waits
    told.tell(1)
    told.comparison.told(told.sources[2], SourceLost("it died"))
    assert not told.comparison.waits
    assert told.progress.compared == 1
    monkeypatch.setattr(http_comparison, "_MOMENT", 0.0)
    told = Told(3)
    assert not told.comparison.waits


def test_most_layouts_are_believed_when_all_have_answered() -> None:
    told = Told(3)
    told.tell(1, OTHER)
    told.comparison.judge_layouts(final=False)  # source 2 may tell still
    told.tell(2, OTHER)
    with pytest.raises(Outvoted, match="source 0") as raised:
        told.comparison.judge_layouts(final=False)
    assert raised.value.names == {"source 0"}
    assert told.progress.bad_sources == [], "the next attempt names it"


def test_of_as_many_layouts_that_of_the_assigned_source_is_believed_while_it_lives() -> None:
    told = Told(2)
    told.tell(1, OTHER)
    told.comparison.judge_layouts(final=False)
    assert told.progress.bad_sources == ["source 1"]
    assert told.sources[1].state == "out"
    told.comparison.judge_layouts(final=True)  # judged once
    assert told.progress.bad_sources == ["source 1"]
    told = Told(2)
    told.tell(1, OTHER)
    told.sources[0].end(SourceLost("it died"))
    with pytest.raises(Outvoted, match="source 0"):
        told.comparison.judge_layouts(final=False)


def test_a_source_that_is_judged_is_not_heard_again() -> None:
    told = Told(2)
    told.sources[1].end(SourceLost("it died"))
    told.tell(1, OTHER, _0=b"x")
    told.comparison.landed(0, b"y")
    assert not told.comparison.disputed
    told.comparison.judge_layouts(final=True)
    assert told.progress.bad_sources == []


# --------------------------------------------------------------- the setting


def test_how_sources_are_compared_is_an_argument_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = "some"
    with pytest.raises(ValueError, match="compare_sources='some'"):
        HTTPTransport(TIMEOUT, hostname="127.0.0.1", compare_sources=wrong)
    with transport() as one:
        assert one._compare == "sample"
    monkeypatch.setenv("TORCHFT_COMPARE_SOURCES", "all")
    with transport() as one, transport(compare_sources="none") as other:
        assert (one._compare, other._compare) == ("all", "none")
    monkeypatch.setenv("TORCHFT_COMPARE_SOURCES", "some")
    with pytest.raises(ValueError, match="TORCHFT_COMPARE_SOURCES"):
        HTTPTransport(TIMEOUT, hostname="127.0.0.1")
