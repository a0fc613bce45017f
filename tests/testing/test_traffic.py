"""The kernel's count of the bytes that were sent: of a plain connection, and of quantized collectives."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch._C._distributed_c10d import ReduceOp, TCPStore

from torchft.collectives import allreduce_quantized
from torchft.process_group import ProcessGroup, ProcessGroupGloo
from torchft.testing.process_group_suite import each
from torchft.testing.traffic import bytes_sent


def test_bytes_sent_counts_what_left_by_tcp_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with client, peer:
            before = bytes_sent()
            client.sendall(b"x" * 10_000)
            got = 0
            while got < 10_000:
                got += len(peer.recv(65536))
            peer.sendall(b"y" * 5)
            assert client.recv(5, socket.MSG_WAITALL) == b"yyyyy"
            assert bytes_sent() - before in (10_000, 10_005)  # the last five may not be acknowledged yet


def test_a_quantized_allreduce_sends_at_most_27_percent_of_the_bytes_of_float32() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups: list[ProcessGroup] = [ProcessGroupGloo(timeout=timedelta(seconds=30)) for _ in range(2)]
    each(groups, lambda rank, pg: pg.configure(f"127.0.0.1:{store.port}/x", f"r{rank}", rank, 2))
    tensors = [torch.randn(2 << 20) for _ in groups]

    def sent(reduce: Callable[[int, ProcessGroup], object]) -> int:
        each(groups, lambda _, pg: pg.barrier().wait())
        before = bytes_sent()
        each(groups, reduce)
        each(groups, lambda _, pg: pg.barrier().wait())
        return bytes_sent() - before

    exact = sent(lambda rank, pg: pg.allreduce([tensors[rank]]).wait())
    quantized = sent(lambda rank, pg: allreduce_quantized([tensors[rank]], ReduceOp.SUM, pg).wait())
    assert exact >= 2 * 4 * (2 << 20)  # each of two sends what it has, once
    assert quantized <= 0.27 * exact
    for pg in groups:
        pg.shutdown()
