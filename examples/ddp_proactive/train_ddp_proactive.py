"""Proactive recovery: one of two groups goes away at step 3, and the other trains on at once.

The same training as train_ddp.py, with two differences: group 1 goes away on purpose, in one of several ways
(``--leave``), and each committed step is printed with the time since the one before, so that the gap can be
seen. README.md says how to run it, with proactive recovery and without, and what each line of the log means.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next line
from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_bytes, state_hash

logger = logging.getLogger("train_ddp_proactive")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

LEAVING_GROUP = 1
LEAVING_STEP = 3


def go_away(how: str, manager: Manager) -> None:
    """What group 1 does at step 3. It comes back from ``leave`` only."""
    logger.warning("step %d: this group goes away now: %s", manager.current_step(), how)
    if how == "leave":
        manager.leave("its machine is needed elsewhere")
        return
    manager.wait_quorum()  # the other group counts on this one now: the step is lost for it
    if how == "exception":
        raise RuntimeError("a bug in this group's training loop")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out: no time to say anything
    os.kill(os.getpid(), signal.SIGSTOP)  # stop: nothing of the process runs any more, its connections stay open


def main() -> None:
    arguments = argparse.ArgumentParser(description="One of two groups goes away at step 3; the other trains on.")
    arguments.add_argument("--leave", choices=("leave", "exception", "kill", "stop"), default="leave")
    how = arguments.parse_args().leave

    settings = Settings(total=os.environ.get("TOTAL_STEPS") or "10")
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

    # --- Fault tolerance: nothing here is about proactive recovery, which is on by default ---
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
    goes_away = settings.replica_group == LEAVING_GROUP
    committed = time.monotonic()
    for images, labels in stream:
        began = time.monotonic()
        optimizer.zero_grad()  # begins the step: who takes part is found out while the forward pass runs
        loss = cross_entropy(model(images.to(device)), labels.to(device))
        if goes_away and how != "leave" and manager.current_step() == LEAVING_STEP:
            go_away(how, manager)
        loss.backward()  # gradients are averaged over the groups that take part

        # The quorum is known by now, so this is the same number in all groups of it. They end together, with
        # one round whose gradients nobody uses: a group that missed the last commit is healed in it.
        step = manager.current_step()
        if step >= settings.total_steps():
            if manager.should_commit():
                break
            continue

        # Only for this play: the first step waits until all groups are there, so that step 3 is one of both.
        if step == 0 and manager.num_participants() < settings.replica_groups:
            time.sleep(0.1)
            continue

        # only if the averaging went well; else the weights stay, and the step is tried again
        optimizer.step()
        if manager.current_step() == step:
            metrics.write("failed", step=step)
            continue

        metrics.write("step", step=step + 1, participants=manager.num_participants(), loss=loss.item())
        now = time.monotonic()
        logger.info(
            "step %d: committed after %.2f s, participants %d, loss %.4f",
            step + 1,
            now - committed,
            manager.num_participants(),
            loss.item(),
        )
        committed = now
        if goes_away and how == "leave" and step + 1 == LEAVING_STEP:
            go_away(how, manager)
            manager.shutdown()
            return
        time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    # --- Report ---
    share, state = accuracy(net, held_out, device), state_hash(state_dict())
    logger.info("done: %d steps, held-out accuracy %.2f %%, state %s", step, 100 * share, state)
    metrics.write("end", step=step, accuracy=share, state=state)
    manager.shutdown()


if __name__ == "__main__":
    main()
