"""Two groups of two ranks under torchft end as one job of four ranks under torch alone.

FSDP is compared to the last bit with torch's own HSDP on a mesh of 2 x 2; what sums in another order, within rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from tests.forked import ForkedProgram
from tests.parallel.numerics import SHARDED
from torchft.coordination import LighthouseServer

SCRIPT = Path(__file__).with_name("numerics.py")
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """What each of the four ranks ended with, by name."""
    lighthouse = LighthouseServer("127.0.0.1:0", min_replicas=2)
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(3)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHFT_")}
    processes = []
    try:
        for rank in range(4):
            environment = {
                "WORLD_PORT": str(stores[2].port),
                "WORLD_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(stores[rank // 2].port),
                "RANK": str(rank % 2),
                "WORLD_SIZE": "2",
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # the stores are here, as torchrun's are in its agent
                "TORCHFT_LIGHTHOUSE": lighthouse.address(),
                "OMP_NUM_THREADS": "1",
            }
            processes.append(
                ForkedProgram(
                    [sys.executable, str(SCRIPT)],
                    env=inherited | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        found = []
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-5000:]
            found.append({line.pop("what"): line for line in map(json.loads, out.splitlines())})
        yield found
    finally:
        for process in processes:
            process.kill()
            process.wait()
        lighthouse.shutdown()


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("how", ["replicate", "mesh"])
def test_hsdp_is_bit_identical_to_torchs_own(results: Results, how: str, name: str) -> None:
    for rank, ours in enumerate(results):
        assert ours[f"{how}: {name}"] == ours[f"torch: {name}"], f"rank {rank}"
    assert results[0][f"{how}: {name}"] == results[2][f"{how}: {name}"]
    assert results[0][f"{how}: {name}"] != results[1][f"{how}: {name}"], "ranks of a group have other shards"


def test_no_sync_accumulates_as_fsdp_does_without_gradient_sync(results: Results) -> None:
    for ours in results:
        assert ours["replicate: no_sync"] == ours["torch: accumulating whole gradients"]


def test_a_hook_on_a_registered_managed_group_does_the_same(results: Results) -> None:
    for ours in results:
        assert ours["hook: plain"] == ours["torch: plain"]


def test_losses_are_reduced_over_the_groups_by_functional_collectives(results: Results) -> None:
    for rank, ours in enumerate(results):
        assert ours["loss"]["values"] == [0.5, 1.0, 0.0, 1.0, 1.0, float(rank // 2)]


def assert_close(ours: Any, reference: Any) -> None:
    for mine, theirs in zip(ours["values"], reference["values"], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-6)


def test_copies_in_each_rank_end_as_those_of_torchs_data_parallel(results: Results) -> None:
    for ours in results:
        assert ours["ddp"] == results[0]["ddp"], "all ranks of all groups are alike to the last bit"
        assert_close(ours["ddp"], ours["torch: ddp"])


@pytest.mark.parametrize("how", ["tensor parallel", "tensor parallel in FSDP"])
def test_tensor_parallel_groups_end_as_one_process_with_both_batches(results: Results, how: str) -> None:
    for ours in results:
        assert ours[how] == results[0][how]
        assert_close(ours[how], ours["torch: one process"])
