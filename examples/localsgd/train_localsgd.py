"""Local SGD: groups train alone and average their parameters now and then (arXiv 1805.09767).

A small language model (examples/characters.py). README.md says how to run it and what the log says;
examples/diloco compares it with data parallelism.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL
from torchft.local_sgd import LocalSGD

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next lines
from examples.characters import CharacterModel, LocalSettings, bits_per_character, load_text, loss_of, windows
from examples.digits import Metrics, state_hash

logger = logging.getLogger("train_localsgd")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main() -> None:
    settings = LocalSettings()
    timeout = timedelta(seconds=settings.timeout_sec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics(settings.metrics_file)
    metrics.write("start")

    # --- Data: every group trains on its own share ---
    train, held_out = load_text()
    stream = windows(train, settings.replica_group, settings.replica_groups, settings.batch_size)

    # --- Model: the same start in every group, so that the first window counts ---
    torch.manual_seed(0)
    model = CharacterModel().to(device)
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-3)

    # --- Fault tolerance ---
    manager = Manager(
        pg=ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=None,  # LocalSGD registers the parameters itself
        state_dict=None,
        timeout=timeout,
        init_sync=False,  # all begin from the same seed
        replica_id=f"train_localsgd_{settings.replica_group}",
    )
    # A group that joins begins with a peer's moments rather than with those of steps that were thrown away.
    manager.register_state_dict_fn("optimizer", adamw.load_state_dict, adamw.state_dict)

    # --- Train: an ordinary loop; each SYNC_EVERY steps of the optimizer a window ends with an average ---
    with LocalSGD(manager, model, adamw, sync_every=settings.sync_every) as local_sgd:
        for inputs, targets in stream:
            window = manager.current_step()
            windows_in_all = settings.total_steps() // settings.sync_every
            if window >= windows_in_all:
                break
            began = time.monotonic()
            adamw.zero_grad()
            loss = loss_of(model, inputs.to(device), targets.to(device))
            loss.backward()
            adamw.step()

            if manager.current_step() > window:
                window = manager.current_step()
                metrics.write("step", step=window, participants=manager.num_participants(), loss=loss.item())
                logger.info(
                    "window %d of %d: loss %.3f, participants %d, %.1f MB handed to the all-reduce",
                    window,
                    windows_in_all,
                    loss.item(),
                    manager.num_participants(),
                    local_sgd.bytes_reduced / 1e6,
                )
            time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    # --- Report: the average of the last window, which all groups agree on ---
    bits, share = bits_per_character(model.cpu(), held_out)
    state = state_hash(local_sgd.state_dict())
    logger.info(
        "done: %d windows, held-out %.3f bits per character, %.1f MB handed to the all-reduce, state %s",
        manager.current_step(),
        bits,
        local_sgd.bytes_reduced / 1e6,
        state,
    )
    metrics.write(
        "end", step=manager.current_step(), accuracy=share, bits=bits, bytes=local_sgd.bytes_reduced, state=state
    )
    manager.shutdown()


if __name__ == "__main__":
    main()
