"""ProcessGroupGloo keeps every promise of the suite, and some of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._C._distributed_c10d import PrefixStore, TCPStore

from tests.forked import ForkedProgram
from torchft.process_group import ProcessGroup, ProcessGroupError, ProcessGroupGloo, gloo
from torchft.testing.process_group_suite import ProcessGroupSuite, each

_STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class TestProcessGroupGloo(ProcessGroupSuite):
    factory = "torchft.process_group:ProcessGroupGloo"

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupGloo(timeout=timeout)

    def test_it_meets_a_plain_gloo_group_under_the_same_prefix(
        self, store: str, idle_groups: list[ProcessGroup]
    ) -> None:
        address = self.address(store)
        host_port, _, prefix = address.partition("/")
        host, _, port = host_port.partition(":")
        theirs, mine = torch.tensor([2.0]), torch.tensor([3.0])

        def plain() -> None:
            client = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
            group = dist.ProcessGroupGloo(PrefixStore(prefix, client), 1, 2, timedelta(seconds=30))
            group.allreduce([theirs]).wait()

        other = threading.Thread(target=plain)
        other.start()
        idle_groups[0].configure(address, "r", 0, 2)
        idle_groups[0].allreduce([mine]).wait()
        other.join(60)
        assert (theirs.item(), mine.item()) == (5.0, 5.0)

    def test_registered_group_carries_functional_collectives(self, groups: list[ProcessGroup]) -> None:
        for rank, pg in enumerate(groups):
            pg.register(f"suite-{rank}")
        try:

            def act(rank: int, pg: ProcessGroup) -> list[object]:
                name = f"suite-{rank}"
                ops = torch.ops._c10d_functional
                wait = ops.wait_tensor
                return [
                    wait(ops.all_reduce(torch.tensor([1.0]), "sum", name)).tolist(),
                    wait(ops.all_gather_into_tensor(torch.tensor([float(rank)]), 3, name)).tolist(),
                    wait(ops.reduce_scatter_tensor(torch.tensor([0.0, 1.0, 2.0]), "sum", 3, name)).tolist(),
                    funcol.all_reduce(torch.tensor([1.0]), "sum", pg).tolist(),
                ]

            assert each(groups, act) == [[[3.0], [0.0, 1.0, 2.0], [3.0 * r], [3.0]] for r in range(3)]
            assert groups[1].group_name == "suite-1"
            with pytest.raises(ProcessGroupError, match="registered already"):
                groups[0].register("other")
        finally:
            for pg in groups:
                pg.unregister()
        groups[0].register("suite-0")  # the name is free again
        groups[0].unregister()

    def test_torch_distributed_functions_take_the_group(self, groups: list[ProcessGroup]) -> None:
        for rank, pg in enumerate(groups):
            pg.register(f"dist-{rank}")
        try:

            def act(rank: int, pg: ProcessGroup) -> list[float]:
                tensor, gathered, part = torch.tensor([1.0]), torch.zeros(3), torch.zeros(1)
                dist.all_reduce(tensor, group=pg)
                dist.broadcast(tensor, src=1, group=pg)
                dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)]), group=pg)
                dist.reduce_scatter_tensor(part, torch.tensor([1.0, 2.0, 3.0]), group=pg)
                return [tensor.item(), *gathered.tolist(), part.item()]

            assert each(groups, act) == [[3.0, 0.0, 1.0, 2.0, 3.0 * (r + 1)] for r in range(3)]
        finally:
            for pg in groups:
                pg.unregister()

    def test_a_stopped_store_is_an_error_after_the_timeout(self) -> None:
        child = ForkedProgram([sys.executable, "-c", _STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            port = int(child.stdout.readline())
            child.send_signal(signal.SIGSTOP)
            pg = self.make(timeout=timedelta(seconds=0.5))
            with pytest.raises(ProcessGroupError, match=f"127.0.0.1:{port}"):
                pg.configure(f"127.0.0.1:{port}/x", "r", 0, 2)
        finally:
            child.kill()
            child.communicate(timeout=30)


@pytest.mark.parametrize("name", ["localhost", "nowhere.invalid"])
def test_a_host_name_that_is_no_use_to_others_is_not_where_gloo_listens(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr(gloo, "local_address_toward", lambda address: f"toward {address}")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert gloo._routed_address("192.0.2.1:29500/x") == "toward http://192.0.2.1:29500"
    assert gloo._routed_address("127.0.0.1:29500/x") is None, "all are on this machine"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert gloo._routed_address("192.0.2.1:29500/x") is None


def test_a_host_name_that_others_reach_is_left_to_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert gloo._routed_address("192.0.2.1:29500/x") is None


def test_gloo_listens_on_the_address_that_routes_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "_routed_address", lambda store_addr: "127.0.0.2")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pgs = [ProcessGroupGloo(timeout=timedelta(seconds=30)) for _ in range(2)]
    try:
        each(pgs, lambda rank, pg: pg.configure(f"127.0.0.1:{store.port}/x", f"r{rank}", rank, 2))
        tensors = [torch.ones(3), torch.ones(3)]
        each(pgs, lambda rank, pg: pg.allreduce([tensors[rank]]).wait())
        assert [t.tolist() for t in tensors] == [[2.0] * 3] * 2
        for pg in pgs:
            assert pg._session is not None
            assert [host for host, _ in pg._session.cut.__self__.own] == ["127.0.0.2"]  # type: ignore[attr-defined]
    finally:
        for pg in pgs:
            pg.shutdown()


def test_members_that_do_not_meet_at_a_loopback_address_are_told_of_it() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pg = ProcessGroupGloo(timeout=timedelta(seconds=0.2))
    try:
        with pytest.raises(ProcessGroupError, match=r"127\.0\.0\.1 is another one on each.*TORCHFT_LIGHTHOUSE"):
            pg.configure(f"127.0.0.1:{store.port}/x", "r", 0, 2)
    finally:
        pg.shutdown()
