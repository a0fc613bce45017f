"""Checkpoints: kill all groups at once, start them again, and the training goes on from the newest checkpoint.

The same training as train_ddp.py with one difference: the Manager is given a directory, where one of the groups
saves the state every so many steps, beside the training. README.md says how to run it and what each line of the log
means.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from torchft import (
    DistributedDataParallel,
    DistributedSampler,
    Manager,
    Optimizer,
    ProcessGroupGloo,
    ProcessGroupNCCL,
)
from torchft.checkpointing import Checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next line
from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_hash

logger = logging.getLogger("train_ddp_checkpoints")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main() -> None:
    arguments = argparse.ArgumentParser(description="Trains with checkpoints, and goes on from them.")
    arguments.add_argument("--directory", type=Path, default=Path("checkpoints"))
    arguments.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    options = arguments.parse_args()

    settings = Settings()
    timeout = timedelta(seconds=settings.timeout_sec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics(settings.metrics_file)
    metrics.write("start")

    # --- Data: every group trains on its own share ---
    train, held_out = load_data(settings.dataset)
    sampler = DistributedSampler(
        train, replica_rank=settings.replica_group, num_replica_groups=settings.replica_groups, shuffle=True
    )
    stream = batches(train, sampler, settings.batch_size)

    # --- Model: deliberately another start in every group; torchft makes them equal ---
    torch.manual_seed(settings.replica_group)
    net = Net(train.tensors[0][0].shape, state_mb=settings.state_mb).to(device)
    adamw = torch.optim.AdamW(net.parameters(), lr=2e-3)

    # --- What a peer that joins or recovers receives, and what is saved ---
    def state_dict() -> dict[str, Any]:
        return {"model": net.state_dict(), "optimizer": adamw.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        net.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    # --- Fault tolerance; with checkpoints= that is all there is to do for them ---
    manager = Manager(
        pg=ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        timeout=timeout,
        replica_id=f"train_ddp_{settings.replica_group}",
        checkpoints=Checkpoints(options.directory, every=options.every, keep=3),
    )
    model = DistributedDataParallel(manager, net)
    optimizer = Optimizer(manager, adamw)

    # The first step would do it too; here we want to know where we are before it.
    restored = manager.restore()
    logger.info("no checkpoint to go on from" if restored is None else f"going on from step {restored}")
    metrics.write("restored", step=restored)

    # --- Train ---
    for images, labels in stream:
        began = time.monotonic()
        optimizer.zero_grad()  # between two steps: every so many of them a snapshot is taken here
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        step = manager.current_step()
        if step >= settings.total_steps():
            if manager.should_commit():
                break
            continue
        optimizer.step()
        if manager.current_step() == step:
            metrics.write("failed", step=step)
            continue
        metrics.write("step", step=step + 1, participants=manager.num_participants(), loss=loss.item())
        if (step + 1) % 50 == 0:
            logger.info("step %d: loss %.4f, participants %d", step + 1, loss.item(), manager.num_participants())
        time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    # --- Report ---
    share, state = accuracy(net, held_out, device), state_hash(state_dict())
    logger.info("done: %d steps, held-out accuracy %.2f %%, state %s", step, 100 * share, state)
    metrics.write("end", step=step, accuracy=share, state=state)
    manager.shutdown()  # a save under way is finished first


if __name__ == "__main__":
    main()
