"""Replica groups on two machines: network namespaces, each with a 127.0.0.1 of its own, and a cable between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import ForkedProgram

ADDRESSES = ("198.51.100.1", "198.51.100.2")
_GROUP = """
import ctypes, hashlib, os, sys
namespace, lighthouse = sys.argv[1:]
with open(namespace) as f:
    if ctypes.CDLL(None, use_errno=True).setns(f.fileno(), 0):
        raise OSError(ctypes.get_errno(), "setns")

os.environ["TORCHFT_LIGHTHOUSE"] = lighthouse
from torch.distributed import TCPStore
from tests.groups import Replica
from torchft.coordination import LighthouseServer

if "198.51.100.1" in os.popen("ip -brief address").read():
    server = LighthouseServer("[::]:29510", min_replicas=2)
store = TCPStore("127.0.0.1", 29600, is_master=True, wait_for_workers=False)  # as torchrun's agent on each machine
replica = Replica(lighthouse, "g", seed=os.getpid(), store_addr="127.0.0.1", store_port=29600)
while replica.manager.current_step() < 3:
    replica.step()
print(replica.manager.num_participants(), hashlib.sha256(replica.weights()).hexdigest())
replica.manager.shutdown()
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def machines() -> Iterator[list[Path]]:
    """The files of two namespaces."""
    names = [f"torchft-test-{os.getpid()}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    _ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"network namespaces cannot be made here: {getattr(e, 'stderr', None) or e}")
        yield [Path("/run/netns") / name for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=30)


def test_groups_whose_stores_are_both_called_127_0_0_1_train_together(machines: list[Path]) -> None:
    programs = [
        ForkedProgram(
            [sys.executable, "-c", _GROUP, str(machine), f"http://{ADDRESSES[0]}:29510"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for machine in machines
    ]
    try:
        told = [program.communicate(timeout=60)[0].split() for program in programs]
        assert told[0][0] == "2"
        assert told[0] == told[1]
    finally:
        for program in programs:
            program.kill()
