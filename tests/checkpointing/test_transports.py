"""Every transport passes the conformance suite, with the process group and sockets it is used with."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.checkpointing.loopback import over_tcp
from torchft.checkpointing import HTTPTransport, PGTransport, pg_local
from torchft.checkpointing.offer import Offer
from torchft.checkpointing.pg_local import LocalOffer
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.runtime.deadline import Deadline
from torchft.testing.transport_suite import Pair, TransportSuite

TIMEOUT = timedelta(seconds=60)


def _damage(offer: Offer) -> None:
    """Of what was hashed, the last byte."""
    assert offer.await_seal(Deadline(60)) is not None
    total = offer.cut.total
    with offer.reading(threading.Lock(), total - 1, total) as views:
        views[0][0] ^= 1


class _HTTPSuite(TransportSuite):
    snapshot: str
    local: bool
    """Whether the receiver may use the Unix socket that is there for receivers on this machine."""

    def open(self, into: Callable[[], Any] | None = None, allow_pickle: bool = False) -> Pair:
        kind: Any = self.snapshot
        source: HTTPTransport[Any] = HTTPTransport(
            TIMEOUT, snapshot=kind, hostname="127.0.0.1", token="s3cret", allow_pickle=allow_pickle, copy_below=0
        )
        receiver: HTTPTransport[Any] = HTTPTransport(
            TIMEOUT, state_dict=into, hostname="127.0.0.1", token="s3cret", allow_pickle=allow_pickle, copy_below=0
        )

        if not self.local:
            metadata = over_tcp(source.metadata())
            source.metadata = lambda: metadata  # type: ignore[method-assign]

        def corrupt() -> None:
            server = source._server
            with server._changed:  # a receiver looks at its tensors before there is an offer
                assert server._changed.wait_for(lambda: server.current is not None, 60)
                offer = server.current
            assert offer is not None
            _damage(offer)

        def close() -> None:
            source.shutdown()
            receiver.shutdown()

        return Pair(source, receiver, source.shutdown, corrupt, close)


class TestHTTPTransport(_HTTPSuite):
    snapshot = "copy"
    local = False
    test_more_than_2_gib_in_one_tensor = pytest.mark.slow(_HTTPSuite.test_more_than_2_gib_in_one_tensor)


class TestHTTPTransportWithoutSnapshot(_HTTPSuite):
    snapshot = "lock"
    local = True
    test_more_than_2_gib_in_one_tensor = pytest.mark.slow(_HTTPSuite.test_more_than_2_gib_in_one_tensor)


class TestHTTPTransportOverAUnixSocket(_HTTPSuite):
    """Where a receiver may not read the source's memory itself."""

    snapshot = "lock"
    local = True
    test_more_than_2_gib_in_one_tensor = pytest.mark.slow(_HTTPSuite.test_more_than_2_gib_in_one_tensor)

    @pytest.fixture(autouse=True)
    def _not_lent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHFT_CROSS_MEMORY", "0")


class _DamagedWork:
    """A receive whose last bit is wrong."""

    def __init__(self, work: dist.Work, message: torch.Tensor) -> None:
        self._work = work
        self._message = message

    def wait(self, timeout: timedelta) -> bool:
        done = self._work.wait(timeout)
        self._message[-1] ^= 1
        return done


class _DamagingGroup:
    """Receives as the group does, but flips a bit of large messages once told to."""

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group = group
        self.damage = False

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> dist.Work:
        return self._group.send(tensors, dst_rank, tag)

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Any:
        work = self._group.recv(tensors, src_rank, tag)
        return _DamagedWork(work, tensors[0]) if self.damage and tensors[0].numel() > 1000 else work


class _PGSuite(TransportSuite):
    local_from: int

    def open(self, into: Callable[[], Any] | None = None, allow_pickle: bool = False) -> Pair:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        groups = [ProcessGroupGloo(TIMEOUT) for _ in range(2)]
        threads = [
            threading.Thread(target=g.configure, args=(f"127.0.0.1:{store.port}/test", f"r{rank}", rank, 2))
            for rank, g in enumerate(groups)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        receiving = _DamagingGroup(groups[1])
        cpu = torch.device("cpu")
        options: Any = {"allow_pickle": allow_pickle, "copy_below": 0, "local_from": self.local_from}
        source: PGTransport[Any] = PGTransport(groups[0], TIMEOUT, cpu, **options)
        receiver: PGTransport[Any] = PGTransport(receiving, TIMEOUT, cpu, into, **options)
        offers: list[LocalOffer] = []
        either = threading.Lock()  # an offer is there when the damage begins, or comes afterwards

        class _Noted(LocalOffer):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                with either:
                    offers.append(self)
                    damaged = receiving.damage
                if damaged:
                    _damage(self._offer)

        noting = mock.patch.object(pg_local, "LocalOffer", _Noted)
        noting.start()

        def corrupt() -> None:
            with either:
                receiving.damage = True
                present = list(offers)
            for offer in present:
                _damage(offer._offer)

        def lose_source() -> None:
            for offer in offers:
                offer.close()
            groups[0].abort()

        def close(keep: dist.TCPStore = store) -> None:
            noting.stop()
            source.shutdown()
            receiver.shutdown()
            for group in groups:
                group.shutdown()

        return Pair(source, receiver, lose_source, corrupt, close)


class TestPGTransport(_PGSuite):
    local_from = sys.maxsize
    test_more_than_2_gib_in_one_tensor = pytest.mark.slow(_PGSuite.test_more_than_2_gib_in_one_tensor)


class TestPGTransportOnOneMachine(_PGSuite):
    local_from = 0
    test_more_than_2_gib_in_one_tensor = pytest.mark.slow(_PGSuite.test_more_than_2_gib_in_one_tensor)

    def test_the_data_went_by_the_local_way(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", "torchft.checkpointing.pg_transport"):
            self.round_trip({"w": torch.ones(1000)})
        assert any("from replica rank 0 on this machine" in r.getMessage() for r in caplog.records)
