"""DiLoCo and Streaming DiLoCo: groups train alone and agree now and then, on what an outer optimizer makes of it.

A small language model (examples/characters.py). ``FRAGMENTS=1`` is DiLoCo (arXiv 2311.08105), more are Streaming
DiLoCo (arXiv 2501.18512). README.md says how to run it, what the log says, and how it compares with data parallelism.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL
from torchft.local_sgd import DiLoCo

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, for the next lines
from examples.characters import CharacterModel, LocalSettings, bits_per_character, load_text, loss_of, windows
from examples.digits import Metrics, state_hash

logger = logging.getLogger("train_diloco")
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

    # --- Model: the same start in every group, so that the first windows count ---
    torch.manual_seed(0)
    model = CharacterModel().to(device)
    inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
    fragments = model.fragments(settings.fragments)
    outer = [torch.optim.SGD(f.parameters(), lr=0.7, momentum=0.9, nesterov=True) for f in fragments]

    # --- Fault tolerance ---
    manager = Manager(
        pg=ProcessGroupNCCL(timeout=timeout) if device.type == "cuda" else ProcessGroupGloo(timeout=timeout),
        min_replica_size=1,
        load_state_dict=None,  # DiLoCo registers the parameters and the outer optimizers' state itself
        state_dict=None,
        timeout=timeout,
        use_async_quorum=False,  # which fragment is due follows the quorum
        init_sync=False,  # all begin from the same seed
        replica_id=f"train_diloco_{settings.replica_group}",
    )
    # A group that joins begins with a peer's moments rather than with those of steps that were thrown away.
    manager.register_state_dict_fn("inner", inner.load_state_dict, inner.state_dict)

    # --- Train: an ordinary loop; each SYNC_EVERY steps of the inner optimizer a synchronisation ends ---
    with DiLoCo(
        manager,
        fragments,
        inner,
        outer,
        sync_every=settings.sync_every,
        should_quantize=settings.quantize,
        fragment_sync_delay=settings.sync_delay,
        fragment_update_alpha=settings.update_alpha,
    ) as diloco:
        for inputs, targets in stream:
            window = manager.current_step()
            windows_in_all = settings.total_steps() // settings.sync_every * settings.fragments
            if window >= windows_in_all:
                break
            began = time.monotonic()
            inner.zero_grad()
            loss = loss_of(model, inputs.to(device), targets.to(device))
            loss.backward()
            inner.step()

            if manager.current_step() > window:
                window = manager.current_step()
                metrics.write("step", step=window, participants=manager.num_participants(), loss=loss.item())
                if window % settings.fragments == 0:
                    logger.info(
                        "window %d of %d: loss %.3f, participants %d, %.1f MB handed to the all-reduce",
                        window,
                        windows_in_all,
                        loss.item(),
                        manager.num_participants(),
                        diloco.bytes_reduced / 1e6,
                    )
            time.sleep(max(0.0, began + settings.step_sec - time.monotonic()))

    # --- Report: what all groups agree on, without what this one has learnt alone since ---
    agreed = diloco.state_dict()
    for fragment, parameters in zip(fragments, agreed["fragments"], strict=True):
        fragment.load_state_dict(parameters, strict=False)
    bits, share = bits_per_character(model.cpu(), held_out)
    state = state_hash(agreed)
    logger.info(
        "done: %d windows, held-out %.3f bits per character, %.1f MB handed to the all-reduce, state %s",
        manager.current_step(),
        bits,
        diloco.bytes_reduced / 1e6,
        state,
    )
    metrics.write(
        "end", step=manager.current_step(), accuracy=share, bits=bits, bytes=diloco.bytes_reduced, state=state
    )
    manager.shutdown()


if __name__ == "__main__":
    main()
