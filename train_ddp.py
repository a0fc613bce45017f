"""Data parallel training that goes on while replica groups die, hang, leave and join.

Each replica group is one process here and holds a whole copy of the model. Start a lighthouse:

    torchft_lighthouse --min_replicas 1 --join_timeout_ms 1000

then as many groups as you like, at any time, each in a shell of its own and with its own number and port:

    export REPLICA_GROUP_ID=0 NUM_REPLICA_GROUPS=2 TORCHFT_LIGHTHOUSE=http://localhost:29510
    torchrun --master_port=29600 --nnodes=1 --nproc_per_node=1 -- train_ddp.py

Kill one, the other goes on with the next step; start it again, it takes the weights from the other and joins.
The settings (``QUICK_RUN``, ``STATE_MB``, ``DATASET``, …) are described in examples/digits.py.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_bytes, state_hash
from torchft import (
    DistributedDataParallel,
    DistributedSampler,
    Manager,
    Optimizer,
    ProcessGroupGloo,
    ProcessGroupNCCL,
)
from torchft.checkpointing import HTTPTransport

logger = logging.getLogger("train_ddp")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main() -> None:
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

    # --- What a peer that joins or recovers receives, and what it does with it ---
    def state_dict() -> dict[str, Any]:
        return {"model": net.state_dict(), "optimizer": adamw.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        net.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])
        metrics.write("healed", step=manager.current_step(), bytes=state_bytes(state))

    # --- Fault tolerance ---
    manager = Manager(
        pg=ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        timeout=timeout,
        replica_id=f"train_ddp_{settings.replica_group}",
        checkpoint_transport=HTTPTransport(timeout=timeout, num_chunks=0),
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
