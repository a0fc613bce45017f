"""One state from several sources: together, and when one of them dies, hangs, lies, or is of another opinion."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.checkpointing.loopback import address_of
from torchft.checkpointing import CheckpointError, HTTPTransport, IntegrityError, SourceLost, StepNotServed
from torchft.checkpointing.chunks import CHUNK_SIZE
from torchft.checkpointing.http_comparison import Comparing
from torchft.checkpointing.http_source import HTTPSource
from torchft.checkpointing.http_workers import Workers
from torchft.checkpointing.offer import Offer
from torchft.runtime.deadline import Deadline
from torchft.testing.faults import Link

TIMEOUT = timedelta(seconds=60)
CHUNKS = 8
STEP = 4
DATA = torch.randint(0, 1 << 62, (CHUNKS * CHUNK_SIZE // 8,)).view(torch.uint8)


def make_state() -> dict[str, torch.Tensor]:
    return {"a": DATA[: 3 * CHUNK_SIZE + 77].clone(), "b": DATA[3 * CHUNK_SIZE + 77 :].clone()}


class Sources:
    """Transports that offer a state, each behind a link, and a receiver that writes into ``live``."""

    def __init__(self, stack: ExitStack, count: int, rate: float | None, compare: Comparing = "sample") -> None:
        self.state = make_state()
        self.live = {k: torch.zeros_like(v) for k, v in self.state.items()}
        self.transports: list[HTTPTransport[Any]] = []
        self.links: list[Link] = []
        for _ in range(count):
            source: HTTPTransport[Any] = HTTPTransport(TIMEOUT, hostname="127.0.0.1", snapshot="lock")
            stack.callback(source.shutdown)
            self.transports.append(source)
            self.links.append(stack.enter_context(Link(address_of(source))))
            self.links[-1].throttle(rate)
        self.receiver: HTTPTransport[Any] = HTTPTransport(
            TIMEOUT, hostname="127.0.0.1", state_dict=lambda: self.live, compare_sources=compare
        )
        stack.callback(self.receiver.shutdown)
        for rank in range(count):
            self.offer(rank, self.state)

    def offer(self, rank: int, state: Any, step: int = STEP) -> None:
        self.transports[rank].send_checkpoint([9], step, state, TIMEOUT)

    def offered(self, rank: int) -> Offer:
        offer = self.transports[rank]._server._offer
        assert offer is not None
        return offer

    def fetched(self) -> int:
        """Bytes that the newest receive took from the network."""
        assert self.receiver.last_receive is not None
        return self.receiver.last_receive.received

    def kept(self) -> int:
        """Bytes that the newest receive took over from the one before."""
        assert self.receiver.last_receive is not None
        return self.receiver.last_receive.kept

    @property
    def metadata(self) -> list[tuple[int, str]]:
        return [(rank, f"torchft-http/1 http://{link.address}") for rank, link in enumerate(self.links)]

    def receive(self, step: int = STEP, timeout: timedelta = TIMEOUT) -> Any:
        return self.receiver.recv_from_many(self.metadata, step, timeout)

    def when_there(self, chunks: int, act: Callable[[], object]) -> threading.Thread:
        """Acts once the receiver has so many chunks."""

        def wait() -> None:
            pause, limit = threading.Event(), Deadline(60)
            while not limit.expired:
                progress = self.receiver.last_receive
                if progress is not None and progress.done >= chunks * CHUNK_SIZE:
                    break
                pause.wait(0.001)
            act()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def assert_right(self, received: Any, state: Any = None) -> None:
        for key, value in (state or self.state).items():
            assert torch.equal(received[key], value), key
            assert received[key] is self.live[key]


@contextmanager
def sources(count: int, rate: float | None = 100e6, compare: Comparing = "sample") -> Iterator[Sources]:
    with ExitStack() as stack:
        yield Sources(stack, count, rate, compare)


def test_slow_sources_share_the_work() -> None:
    with sources(3, rate=40e6) as s:
        s.assert_right(s.receive())
        shares = [s.offered(r).bytes_sent for r in range(3)]
        assert min(shares) >= CHUNK_SIZE
        assert s.fetched() <= (CHUNKS + 3) * CHUNK_SIZE


def test_a_fast_source_needs_no_other_and_the_others_hash_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_SOON", "_PATIENCE"):  # whatever this machine does, it is fast enough
        monkeypatch.setattr(f"torchft.checkpointing.http_download.{limit}", 60.0)
    with sources(3, rate=None, compare="none") as s:
        metadata = [(rank, t.metadata()) for rank, t in enumerate(s.transports)]
        s.assert_right(s.receiver.recv_from_many(metadata, STEP, TIMEOUT))
        for rank in (1, 2):
            assert not s.offered(rank).readers
            assert s.offered(rank).digest_of(0) is None


def test_source_that_dies_half_way_costs_only_what_was_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), sources(2, rate=40e6) as s:
        killer = s.when_there(2, lambda: (s.links[0].refuse(), s.links[0].cut()))
        s.assert_right(s.receive())
        killer.join(60)
        assert s.fetched() < (CHUNKS + 2) * CHUNK_SIZE  # at most what two connections had not finished


def test_source_that_hangs_is_taken_over_from() -> None:
    with sources(2) as s:
        hanger = s.when_there(1, s.links[0].block)
        s.assert_right(s.receive(timeout=timedelta(seconds=45)))
        hanger.join(60)


def test_sources_that_were_taken_over_from_come_back_when_the_faster_one_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    with sources(2, rate=None) as s:
        s.links[0].throttle(1e6)
        s.links[1].throttle(60e6)
        real, taken = Workers._take_over, []

        def take_over(workers: Workers, victim: int, by: HTTPSource) -> None:
            real(workers, victim, by)
            taken.append(victim)
            if len(taken) == 2:  # both connections of the slow one have ended
                s.links[1].refuse()
                s.links[1].cut()
                s.links[0].throttle(None)

        monkeypatch.setattr(Workers, "_take_over", take_over)
        s.assert_right(s.receive(timeout=timedelta(seconds=20)))
        assert len(taken) >= 2


def test_source_that_never_tells_its_hashes_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), sources(2, compare="none") as s, s.offered(0)._sealing:
        s.assert_right(s.receive())
        assert "replica rank 0 (http://" in caplog.text
        assert "does not tell its hashes" in caplog.text


def test_source_that_hangs_before_its_manifest_is_not_waited_for() -> None:
    with sources(2, rate=None) as s:
        s.links[0].block()
        s.assert_right(s.receive(timeout=timedelta(seconds=40)))


def test_source_that_sends_wrong_bytes_is_named_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), sources(2) as s:
        s.offer(1, {k: v.clone() for k, v in s.state.items()})
        bad = s.offered(1)
        assert bad.await_seal(Deadline(60)) is not None
        for index in range(CHUNKS):  # all of it, after it was hashed
            start, _ = bad.cut.span(index)
            with bad.reading(threading.Lock(), start, start + 1) as views:
                views[0][0] ^= 1
        s.links[0].throttle(20e6)  # it is asked for more than one chunk before the good one has given all
        s.assert_right(s.receive())
        assert "replica rank 1" in caplog.text
        assert "is not used any more" in caplog.text


@pytest.mark.parametrize("count", [1, 2])
def test_a_state_that_is_replaced_while_it_is_read_is_not_mixed_with_the_next(count: int) -> None:
    with sources(count, rate=20e6) as s:

        def replace() -> None:
            s.transports[0].disallow_checkpoint()
            s.offer(0, {key: value ^ 1 for key, value in s.state.items()})

        replacing = s.when_there(1, replace)
        if count == 1:
            with pytest.raises(IntegrityError, match=f"replaced its state of step {STEP} while it was read"):
                s.receive()
        else:
            s.assert_right(s.receive())
        replacing.join(60)


def test_of_one_that_falls_silent_at_the_last_hash_the_rest_comes_from_another() -> None:
    go_on = threading.Event()
    with sources(2, rate=None) as s:
        offer = s.offered(0)
        hashed, last = offer.hashed, offer.cut.count - 1

        def silent(index: int, value: bytes) -> None:
            if index == last:
                go_on.wait(60)  # all its bytes are sent
            hashed(index, value)

        offer.hashed = silent  # type: ignore[method-assign]
        try:
            s.assert_right(s.receive(timeout=timedelta(seconds=40)))
            assert s.offered(1).bytes_sent > 0
        finally:
            go_on.set()


def lose(offer: Offer, *chunks: int) -> None:
    """As when the source goes on, and has sent these to all who read."""
    offer._held = offer._held[0], frozenset(range(offer.cut.count)) - set(chunks)


def test_a_source_that_went_on_is_replaced_by_the_others_once_it_lacks_something() -> None:
    with sources(3, rate=40e6) as s:
        s.links[0].throttle(None)
        lose(s.offered(0), 5)
        s.assert_right(s.receive())
        assert s.offered(0).bytes_sent > 0


@pytest.mark.parametrize("count", [1, 2])
def test_what_no_source_has_any_more_is_not_waited_for(count: int) -> None:
    with sources(count) as s:
        for rank in range(count):
            lose(s.offered(rank), 3)
        with pytest.raises(StepNotServed, match=rf"replica rank {count - 1}: .* went on before this receiver had all"):
            s.receive()


@pytest.mark.parametrize("count", [2, 3])
def test_source_whose_state_differs_is_named_and_the_others_are_believed(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), sources(count) as s:
        other = {k: v.clone() for k, v in s.state.items()}
        for tensor in other.values():
            tensor[::CHUNK_SIZE] ^= 1  # each chunk
        odd = 0 if count == 3 else 1  # of two the assigned one is believed, of three the two that agree
        s.offer(odd, other)
        s.assert_right(s.receive())
        assert f"replica rank {odd} " in caplog.text
        assert "silent corruption" in caplog.text
        assert ("nobody can say which is right" in caplog.text) == (count == 2)


def test_whole_fetch_broken_and_resumed_fetches_only_the_rest() -> None:
    with sources(2, rate=25e6) as s:

        def lose_all() -> None:
            for link in s.links:
                link.refuse()
                link.cut()

        breaker = s.when_there(3, lose_all)
        with pytest.raises(SourceLost, match=r"replica rank 0.*replica rank 1"):
            s.receive()
        breaker.join(60)
        for link in s.links:
            link.restore()
        s.assert_right(s.receive())
        assert s.kept() >= CHUNK_SIZE
        assert s.fetched() < CHUNKS * CHUNK_SIZE - s.kept() + 2 * CHUNK_SIZE, "what was there was fetched again"


def test_what_was_written_between_two_attempts_is_fetched_again() -> None:
    with sources(1, rate=40e6) as s:
        breaker = s.when_there(5, lambda: (s.links[0].refuse(), s.links[0].cut()))
        with pytest.raises(SourceLost):
            s.receive()
        breaker.join(60)
        s.live["a"].zero_()  # the process of the receiver went on
        s.links[0].restore()
        s.assert_right(s.receive())


def test_next_attempt_at_another_step_fetches_what_has_changed() -> None:
    with sources(1, rate=40e6) as s:
        breaker = s.when_there(5, lambda: (s.links[0].refuse(), s.links[0].cut()))
        with pytest.raises(SourceLost):
            s.receive()
        breaker.join(60)
        s.links[0].restore()
        later = {"a": s.state["a"], "b": s.state["b"] + 1}
        s.offer(0, later, STEP + 1)
        s.assert_right(s.receive(STEP + 1), later)
        assert s.kept() >= CHUNK_SIZE
        assert s.fetched() < CHUNKS * CHUNK_SIZE


def test_sources_that_are_told_of_later_are_used() -> None:
    with sources(2) as s:
        growing = s.metadata[:1]
        s.when_there(1, lambda: growing.append(s.metadata[1]))
        s.assert_right(s.receiver.recv_from_many(growing, STEP, TIMEOUT))
        assert s.offered(1).bytes_sent > 0


def test_source_with_another_transport_is_passed_over() -> None:
    with sources(2) as s:
        metadata = [s.metadata[0], (5, "<n/a>"), s.metadata[1]]
        s.assert_right(s.receiver.recv_from_many(metadata, STEP, TIMEOUT))


def test_all_sources_wrong_is_an_error_that_names_them() -> None:
    with sources(1, rate=None) as s:
        bad = s.offered(0)
        assert bad.await_seal(Deadline(60)) is not None
        s.state["b"][-1] ^= 1
        with pytest.raises(IntegrityError, match="replica rank 0"):
            s.receive()


def test_transport_that_knows_one_source_takes_the_first() -> None:
    from torchft.checkpointing import CheckpointTransport

    class Old(CheckpointTransport[str]):
        def metadata(self) -> str:
            return "old"

        def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: str, timeout: timedelta) -> None: ...

        def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> str:
            return f"{src_rank} {metadata} {step}"

    assert Old().recv_from_many([(3, "three"), (4, "four")], 7, TIMEOUT) == "3 three 7"
    assert not Old().takes_many_sources
    with pytest.raises(CheckpointError, match="same transport"), sources(1) as s:
        s.receiver.recv_from_many([(3, "three")], STEP, TIMEOUT)
