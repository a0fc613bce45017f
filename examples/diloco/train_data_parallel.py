"""The yardstick for what trains with little communication: the same model and data, gradients averaged in each step."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo, ProcessGroupNCCL

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next lines
from examples.characters import CharacterModel, LocalSettings, bits_per_character, load_text, loss_of, windows
from examples.digits import Metrics, state_bytes, state_hash

logger = logging.getLogger("train_data_parallel")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main() -> None:
    settings = LocalSettings()
    timeout = timedelta(seconds=settings.timeout_sec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics(settings.metrics_file)
    metrics.write("start")

    train, held_out = load_text()
    stream = windows(train, settings.replica_group, settings.replica_groups, settings.batch_size)
    torch.manual_seed(0)
    net = CharacterModel().to(device)
    adamw = torch.optim.AdamW(net.parameters(), lr=2e-3)

    def state_dict() -> dict[str, Any]:
        return {"model": net.state_dict(), "optimizer": adamw.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        net.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        timeout=timeout,
        replica_id=f"train_data_parallel_{settings.replica_group}",
    )
    model = DistributedDataParallel(manager, net)
    optimizer = Optimizer(manager, adamw)
    gradient_bytes = state_bytes(dict(net.named_parameters()))
    reduced = 0

    for inputs, targets in stream:
        step = manager.current_step()
        if step >= settings.total_steps():
            break
        began = time.monotonic()
        optimizer.zero_grad()
        loss = loss_of(model, inputs.to(device), targets.to(device))
        loss.backward()
        reduced += gradient_bytes
        optimizer.step()
        if manager.current_step() > step:
            step = manager.current_step()
            metrics.write("step", step=step, participants=manager.num_participants(), loss=loss.item())
            if step % 50 == 0:
                logger.info("step %d: loss %.3f, participants %d", step, loss.item(), manager.num_participants())
        time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    bits, share = bits_per_character(net.cpu(), held_out)
    state = state_hash(state_dict())
    logger.info(
        "done: %d steps, held-out %.3f bits per character, %.1f MB handed to the all-reduce, state %s",
        step,
        bits,
        reduced / 1e6,
        state,
    )
    metrics.write("end", step=step, accuracy=share, bits=bits, bytes=reduced, state=state)
    manager.shutdown()


if __name__ == "__main__":
    main()
