"""The process group of the ranks of a group that torchrun restarts."""

from __future__ import annotations

import subprocess
import sys

from torch.distributed import TCPStore

from tests.forked import ForkedProgram

CODE = """
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from torchft.parallel import init_process_group
from torchft.testing.wait import wait_until

timeout = timedelta(seconds=20)
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60))
for life in ("0", "1"):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = life
    if life == "1" and os.environ["RANK"] == "1":
        store.wait(["rank 0 has ended"])
    elif life == "1":
        keys = store.num_keys()
        store.set("rank 0 has ended", "")
        # Rank 1 looks for rank 0 from then on, and must not take the one of the former life for it.
        wait_until(lambda: store.num_keys() > keys + 1, 60)
    init_process_group("gloo", timeout)
    tensor = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(tensor)
    print(tensor.item(), flush=True)
    dist.destroy_process_group()
"""


def test_a_second_life_does_not_find_the_addresses_of_the_first() -> None:
    # As torchrun's agent keeps it over all lives of a group.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        ForkedProgram(
            [sys.executable, "-c", CODE], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        assert [rank.communicate(timeout=200)[0].split() for rank in ranks] == [["3.0", "3.0"]] * 2
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
