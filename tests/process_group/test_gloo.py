"""ProcessGroupGloo keeps every promise of the suite, and some of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._C._distributed_c10d import PrefixStore, TCPStore

from torchft.process_group import ProcessGroup, ProcessGroupError, ProcessGroupGloo
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
        child = subprocess.Popen(
            [sys.executable, "-c", _STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            port = int(child.stdout.readline())
            os.kill(child.pid, signal.SIGSTOP)
            pg = self.make(timeout=timedelta(seconds=0.5))
            with pytest.raises(ProcessGroupError, match=f"127.0.0.1:{port}"):
                pg.configure(f"127.0.0.1:{port}/x", "r", 0, 2)
        finally:
            child.kill()
            child.communicate(timeout=30)
