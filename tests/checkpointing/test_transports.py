"""Every transport passes the conformance suite, with the process group and sockets it is used with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpointing.loopback import over_tcp
from torchft.checkpointing import HTTPTransport, PGTransport
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.runtime.deadline import Deadline
from torchft.testing.transport_suite import Pair, TransportSuite

TIMEOUT = timedelta(seconds=60)


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
            offer = source._server._offer
            assert offer is not None
            assert offer.await_seal(Deadline(60)) is not None
            total = offer.cut.total
            with offer.reading(threading.Lock(), total - 1, total) as views:
                views[0][0] ^= 1

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


class TestPGTransport(TransportSuite):
    test_more_than_2_gib_in_one_tensor = pytest.mark.slow(TransportSuite.test_more_than_2_gib_in_one_tensor)

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
        source: PGTransport[Any] = PGTransport(groups[0], TIMEOUT, cpu, allow_pickle=allow_pickle, copy_below=0)
        receiver: PGTransport[Any] = PGTransport(receiving, TIMEOUT, cpu, into, allow_pickle=allow_pickle, copy_below=0)

        def corrupt() -> None:
            receiving.damage = True

        def close(keep: dist.TCPStore = store) -> None:
            source.shutdown()
            receiver.shutdown()
            for group in groups:
                group.shutdown()

        return Pair(source, receiver, groups[0].abort, corrupt, close)
