"""Whose hashes are believed when sources announce different ones, and what becomes of the chunks of the others."""

from __future__ import annotations

import time

import pytest

from torchft.checkpointing.chunks import CHUNK_SIZE, DIGEST_BYTES, Cut, Seal
from torchft.checkpointing.fetch_progress import FetchProgress
from torchft.checkpointing.http_agreement import Agreement
from torchft.checkpointing.http_differences import Undecided
from torchft.checkpointing.http_source import HTTPSource
from torchft.core.transfer_plan import MAX_BAD, TransferPlan, Work

CUT = Cut(3 * CHUNK_SIZE)
BODY = bytes(DIGEST_BYTES)


def digests(*names: str) -> list[bytes]:
    return [name.encode() * DIGEST_BYTES for name in names]


class Fetch:
    """One whose chunks have all landed, from sources that announce the hashes that are given, as one letter each."""

    def __init__(self, *announced: str, givers: tuple[int, int, int]) -> None:
        self.sources = [HTTPSource(i, f"source {i}", [], state="ready") for i in range(len(announced))]
        for source, letters in zip(self.sources, announced, strict=True):
            source.asked_for_seal = time.monotonic()
            source.seal = Seal(CUT, b"".join(digests(*letters)), BODY)
        self.progress = FetchProgress(1)
        self.progress.begin(CUT.total, 0)
        self.agreement = Agreement(1, self.progress)
        self.agreement.begin({}, CUT)
        self.plan = TransferPlan([CUT.chunk_size] * CUT.count, range(CUT.count))
        for index, giver in enumerate(givers):
            self.agreement.landed(index, digests(*announced[giver])[index], self.sources[giver])
            self.progress.landed(CUT.length(index))

    def reached(self) -> Seal | None:
        return self.agreement.reached(self.sources, self.plan)

    @property
    def out(self) -> list[int]:
        return [s.index for s in self.sources if s.state == "out"]


def sends_bad_bytes(plan: TransferPlan, source: int) -> None:
    """Chunks from it were bad, and were fetched again from another one."""
    plan.add(0, source)
    plan.add(1, source + 1)
    for index in range(MAX_BAD):
        plan.revoke([index])
        assert isinstance(plan.ask(0, 0.0), Work)
        plan.bad(0, index)
        assert isinstance(plan.ask(1, 0.0), Work)
        plan.verified(1, index)
    assert plan.distrusted(source)
    assert plan.finished


def test_what_all_announce_is_the_state() -> None:
    fetch = Fetch("abc", "abc", givers=(0, 1, 0))
    assert fetch.agreement.of_several
    seal = fetch.reached()
    assert seal is not None
    assert seal.chunks == b"".join(digests(*"abc"))
    assert [s.index for s in fetch.agreement.givers] == [0, 1]
    assert fetch.out == []


def test_most_are_believed_and_what_the_other_vouches_for_is_missing_again(caplog: pytest.LogCaptureFixture) -> None:
    fetch = Fetch("abX", "abc", "abc", givers=(0, 1, 0))
    assert fetch.reached() is None
    assert fetch.out == [0]
    assert fetch.agreement.undecided is None
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert fetch.progress.bad_sources == ["source 0"]
    assert sorted(fetch.agreement.verified) == [0, 1], "chunk 0 is what the others have, too"
    assert fetch.progress.done == 2 * CHUNK_SIZE
    assert not fetch.plan.finished


def test_of_two_the_assigned_one_is_believed_unless_it_sent_bad_bytes(caplog: pytest.LogCaptureFixture) -> None:
    fetch = Fetch("abc", "abX", givers=(0, 0, 1))
    assert fetch.reached() is None
    assert fetch.out == [1]
    assert fetch.agreement.undecided == Undecided(fetch.sources[0], [fetch.sources[1]])
    assert not caplog.records, "the fetch says it"
    fetch = Fetch("abc", "abX", givers=(0, 0, 1))
    sends_bad_bytes(fetch.plan, source=0)
    seal = fetch.reached()
    assert seal is not None
    assert seal.chunks == b"".join(digests(*"abX"))
    assert fetch.out == [0]
    assert fetch.agreement.undecided is None, "who sent bad bytes has no say"


def test_who_does_not_tell_its_hashes_is_given_up_when_another_has() -> None:
    fetch = Fetch("abc", "abc", givers=(0, 1, 0))
    fetch.sources[1].seal = None
    assert fetch.reached() is None
    assert fetch.out == [], "it has a second"
    fetch.sources[1].asked_for_seal = time.monotonic() - 3600
    seal = fetch.reached()
    assert seal is not None
    assert fetch.out == [1]


@pytest.mark.parametrize("giver", [0, 1])
def test_one_that_gave_another_chunk_than_it_says_is_not_asked_for_it_again_and_again(giver: int) -> None:
    fetch = Fetch("abc", "abc", givers=(0, 1, giver))
    fetch.agreement.landed(2, digests("X")[0], fetch.sources[giver])
    assert fetch.reached() is None
    assert fetch.out == [giver]
    assert sorted(fetch.agreement.verified) == [0, 1]


def test_a_state_of_one_source_needs_no_comparison() -> None:
    fetch = Fetch("abc", givers=(0, 0, 0))
    assert not fetch.agreement.of_several
    assert fetch.agreement.whole(BODY).chunks == b"".join(digests(*"abc"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no time for hashes that nobody tells."""
    monkeypatch.setattr("torchft.checkpointing.http_agreement._ALL_SILENT", -60.0)


def test_all_have_seconds_to_tell_their_hashes() -> None:
    fetch = Fetch("abc", "abc", givers=(0, 1, 0))
    for source in fetch.sources:
        source.seal = None
    assert fetch.reached() is None
    assert fetch.out == []


@pytest.mark.usefixtures("impatient")
def test_a_dispute_in_which_nobody_tells_its_hashes_ends_with_the_assigned_source(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fetch = Fetch("abc", "abX", "abc", givers=(0, 0, 0))
    fetch.agreement.disputed = True
    for source in fetch.sources:
        source.seal = None
    fetch.sources[2].state = "opening"
    assert fetch.agreement.of_several
    assert fetch.reached() is None
    assert fetch.out == [1, 2]
    assert not fetch.agreement.of_several, "it is taken as it is"
    assert fetch.plan.finished
    assert fetch.agreement.whole(BODY).chunks == b"".join(digests(*"abc"))
    (line,) = [r.getMessage() for r in caplog.records]
    assert "no source of step 1 told its hashes within" in line
    assert "source 0 () is believed" in line


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kept", [True, False])
def test_where_nobody_tells_its_hashes_what_the_one_that_is_believed_did_not_give_is_missing_again(kept: bool) -> None:
    fetch = Fetch("abc", "abc", givers=(0, 1, 0))
    if kept:
        fetch.agreement.begin({1: digests("b")[0]}, CUT)
        for index in (0, 2):
            fetch.agreement.landed(index, digests(*"abc")[index], fetch.sources[0])
    for source in fetch.sources:
        source.seal = None
    assert fetch.reached() is None
    assert fetch.out == [1]
    assert sorted(fetch.agreement.verified) == [0, 2]
    assert fetch.progress.done == 2 * CHUNK_SIZE
    assert not fetch.plan.finished
    assert not fetch.agreement.of_several


@pytest.mark.usefixtures("impatient")
def test_one_that_gave_nothing_is_not_believed_where_nobody_tells_its_hashes() -> None:
    fetch = Fetch("abc", "abc", givers=(1, 1, 1))
    fetch.agreement.disputed = True
    for source in fetch.sources:
        source.seal = None
    assert fetch.reached() is None
    assert fetch.out == [0]
    assert fetch.plan.finished
