"""What is made of the layouts and hashes that sources tell, and how a receiver is told to compare them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpointing.loopback import TIMEOUT, transport
from torchft.checkpointing import HTTPTransport, http_comparison
from torchft.checkpointing.chunks import CHUNK_SIZE, Cut, Sample, Seal
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_comparison import Comparison, Outvoted
from torchft.checkpointing.http_differences import Undecided
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.transport import SourceLost

BODY, OTHER = bytes(16), bytes([1] * 16)
CUT = Cut(3 * CHUNK_SIZE)


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
    assert told.comparison.undecided is None


def test_of_as_many_layouts_that_of_the_assigned_source_is_believed_while_it_lives() -> None:
    told = Told(2)
    told.tell(1, OTHER)
    told.comparison.judge_layouts(final=False)
    assert told.progress.bad_sources == ["source 1"]
    assert told.sources[1].state == "out"
    assert told.comparison.undecided == Undecided(told.sources[0], [told.sources[1]])
    told.comparison.judge_layouts(final=True)  # judged once
    assert told.progress.bad_sources == ["source 1"]
    told = Told(2)
    told.tell(1, OTHER)
    told.sources[0].end(SourceLost("it died"))
    with pytest.raises(Outvoted, match="source 0"):
        told.comparison.judge_layouts(final=False)
    assert told.comparison.undecided == Undecided(told.sources[1], [told.sources[0]])


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
