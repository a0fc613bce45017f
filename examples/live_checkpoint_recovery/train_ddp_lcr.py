"""Live checkpoint recovery: a group that joins in the middle takes the weights from a running one and trains on.

The same training as train_ddp.py, with two differences: group 0 joins late, on purpose, and the state travels
over the process group, straight into the joiner's tensors. README.md says how to run it and what each line of
the log means.
"""

from __future__ import annotations

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
from torchft.checkpointing import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next line
from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_bytes, state_hash

logger = logging.getLogger("train_ddp_lcr")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main() -> None:
    settings = Settings()
    REPLICA_GROUP_ID = settings.replica_group
    timeout = timedelta(seconds=settings.timeout_sec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics(settings.metrics_file)
    metrics.write("start")

    # --- Data: every group trains on its own share ---
    train, held_out = load_data(settings.dataset)
    sampler = DistributedSampler(
        train, replica_rank=REPLICA_GROUP_ID, num_replica_groups=settings.replica_groups, shuffle=True
    )
    stream = batches(train, sampler, settings.batch_size)

    # --- Model: deliberately another start in every group; torchft makes them equal ---
    torch.manual_seed(REPLICA_GROUP_ID)
    net = Net(train.tensors[0][0].shape, state_mb=settings.state_mb).to(device)
    adamw = torch.optim.AdamW(net.parameters(), lr=2e-3)

    # --- What a peer that joins or recovers receives, and what it does with it ---
    def state_dict() -> dict[str, Any]:
        return {"model": net.state_dict(), "optimizer": adamw.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        net.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])
        metrics.write("healed", step=manager.current_step(), bytes=state_bytes(state))

    # --- Fault tolerance ---
    pg = ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout)

    # With state_dict, a transport receives into these tensors, in the same tree as what a peer sends.
    def live() -> dict[str, Any]:
        return {"user": {"default": state_dict()}, "torchft": manager.state_dict()}

    if settings.transport == "http":
        transport = HTTPTransport(timeout=timeout, num_chunks=0, state_dict=live)
    else:
        transport = PGTransport(pg, timeout=timeout, device=device, state_dict=live)

    # Simulates a worker that joins the training in the middle. Its step is less than the step of the workers
    # that train, which triggers live checkpoint recovery.
    if REPLICA_GROUP_ID == 0:
        time.sleep(settings.join_delay_sec)

    manager = Manager(
        pg=pg,
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        timeout=timeout,
        replica_id=f"train_ddp_{REPLICA_GROUP_ID}",
        checkpoint_transport=transport,
    )
    model = DistributedDataParallel(manager, net)
    optimizer = Optimizer(manager, adamw)

    # --- Train ---
    for images, labels in stream:
        began = time.monotonic()
        optimizer.zero_grad()  # begins the step: who takes part is found out while the forward pass runs
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()  # gradients are averaged over the groups that take part

        # The quorum is known by now, so this is the same number in all groups of it. They end together, with
        # one round whose gradients nobody uses: a group that missed the last commit is healed in it.
        step = manager.current_step()
        if step >= settings.total_steps():
            if manager.should_commit():
                break
            continue

        # only if the averaging went well; else the weights stay, and the step is tried again
        optimizer.step()
        if manager.current_step() == step:
            metrics.write("failed", step=step)
            continue

        metrics.write("step", step=step + 1, participants=manager.num_participants(), loss=loss.item())
        if (step + 1) % 50 == 0:
            logger.info(
                "step %d: loss %.4f, participants %d, batches since the start %d",
                step + 1,
                loss.item(),
                manager.num_participants(),
                manager.batches_committed(),
            )
        time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    # --- Report ---
    share, state = accuracy(net, held_out, device), state_hash(state_dict())
    logger.info("done: %d steps, held-out accuracy %.2f %%, state %s", step, 100 * share, state)
    metrics.write("end", step=step, accuracy=share, state=state)
    manager.shutdown()


if __name__ == "__main__":
    main()
