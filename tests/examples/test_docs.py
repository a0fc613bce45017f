"""The loops that the documents show, run as they stand there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import torchft
from torchft.coordination import LighthouseServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/adopting.md"])
def test_the_loop_of_a_page_trains(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    (loop,) = [block for block in blocks if "while manager.current_step()" in block]
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    before = net.weight.detach().clone()
    adam = torch.optim.AdamW(net.parameters())
    names: dict[str, Any] = {name: getattr(torchft, name) for name in torchft.__all__}
    names |= {"torch": torch, "logging": logging, "net": net, "adam": adam, "loss_fn": cross_entropy}
    names |= {"schedule": torch.optim.lr_scheduler.ConstantLR(adam), "load": lambda state: None}
    names |= {"inputs": torch.ones(3, 4), "labels": torch.tensor([0, 1, 0]), "total_steps": 3}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    lighthouse = LighthouseServer("127.0.0.1:0", min_replicas=1)
    try:
        monkeypatch.setenv("TORCHFT_LIGHTHOUSE", lighthouse.address())
        exec(compile(loop, page, "exec"), names)
        assert names["manager"].current_step() == 3
        assert not torch.equal(net.weight, before)
    finally:
        if "manager" in names:
            names["manager"].shutdown()
        lighthouse.shutdown()
