"""Hybrid sharded data parallelism: each group shards the model over its two ranks, replicas of it come and go.

The same training as train_ddp.py, with groups of several ranks. Inside a group FSDP2 shards parameters, gradients and
optimizer state; ``replicate`` averages the gradients' shards over the groups. A group that joins takes its shards from
the same ranks of a group that trains. README.md says how to run it, what happens when a rank is killed, and what each
line of the log means.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from torchft import DistributedSampler, Manager, Optimizer, ProcessGroupGloo, ProcessGroupNCCL
from torchft.parallel import LiveState, init_process_group, replicate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next line
from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_bytes, state_hash

logger = logging.getLogger("train_hsdp")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def whole(state: Any) -> Any:
    """The state with whole tensors in place of shards, for the hash at the end. All ranks of a group call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def main() -> None:
    settings = Settings()
    timeout = timedelta(seconds=settings.timeout_sec)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    # --- Inside the group: torch's own process group, of the ranks that torchrun started ---
    init_process_group("nccl" if device.type == "cuda" else "gloo", timeout)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    metrics = Metrics(settings.metrics_file if dist.get_rank() == 0 else "")
    metrics.write("start")

    # --- Data: every rank of every group trains on its own share ---
    train, held_out = load_data(settings.dataset)
    sampler = DistributedSampler(
        train, replica_rank=settings.replica_group, num_replica_groups=settings.replica_groups, shuffle=True
    )
    stream = batches(train, sampler, settings.batch_size)

    # --- Model: deliberately another start in every group; torchft makes them equal ---
    torch.manual_seed(settings.replica_group)
    net = Net(train.tensors[0][0].shape, state_mb=settings.state_mb).to(device)
    fully_shard(net.convolutions, mesh=mesh)
    fully_shard(net.classifier, mesh=mesh)
    fully_shard(net, mesh=mesh)
    adamw = torch.optim.AdamW(net.parameters(), lr=2e-3)

    # --- What a rank of a group that joins receives from the same rank of another group: its shards ---
    state = LiveState(net, adamw)

    def load_state_dict(received: dict[str, Any]) -> None:
        state.load_state_dict(received)
        local = [v.to_local() for v in received["model"].values() if isinstance(v, DTensor)]
        metrics.write("healed", step=manager.current_step(), bytes=state_bytes(local))

    # --- Fault tolerance ---
    manager = Manager(
        pg=ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state.state_dict,
        timeout=timeout,
        replica_id=f"train_hsdp_{settings.replica_group}",
    )
    replicate(net, manager)
    optimizer = Optimizer(manager, adamw)

    # --- Train ---
    for images, labels in stream:
        began = time.monotonic()
        optimizer.zero_grad()  # begins the step: who takes part is found out while the forward pass runs
        loss = cross_entropy(net(images.to(device)), labels.to(device))
        loss.backward()  # averaged over the ranks of the group, then over the groups that take part

        # The quorum is known by now, so this is the same number in all ranks of all groups of it. They end together,
        # with one round whose gradients nobody uses: a group that missed the last commit is healed in it.
        step = manager.current_step()
        if step >= settings.total_steps():
            if manager.should_commit():
                break
            continue

        optimizer.step()  # only if all ranks of the group say so; else the weights stay, and the step is tried again
        if manager.current_step() == step:
            metrics.write("failed", step=step)
            continue

        metrics.write("step", step=step + 1, participants=manager.num_participants(), loss=loss.item())
        if (step + 1) % 50 == 0 and dist.get_rank() == 0:
            logger.info(
                "step %d: loss %.4f, participants %d, batches since the start %d",
                step + 1,
                loss.item(),
                manager.num_participants(),
                manager.batches_committed(),
            )
        time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    # --- Report: both ranks compute, one tells ---
    share, total = accuracy(net, held_out, device), state_hash(whole(state.state_dict()))
    if dist.get_rank() == 0:
        logger.info("done: %d steps, held-out accuracy %.2f %%, state %s", step, 100 * share, total)
    metrics.write("end", step=step, accuracy=share, state=total)
    manager.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
