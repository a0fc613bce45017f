"""One rank of a group whose model is sharded by FSDP2, for tests that kill ranks and groups.

It prints a JSON line per event and trains until the file ``--stop-file`` names a step and that step is committed. The
state travels as the file ``--transport-file`` says when it does: ``http`` or ``pg``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchft import Manager, Optimizer, ProcessGroupGloo
from torchft.checkpointing import CheckpointTransport, HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport
from torchft.parallel import LiveState, init_process_group, replicate

WIDTH = 256
GRACE = timedelta(seconds=2)


def emit(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
    sys.stdout.flush()


class Either(CheckpointTransport[dict[str, Any]]):
    """Two transports, of which a file names the one in use: no two groups may ask for another one at a time."""

    receives_in_place = True

    def __init__(self, file: Path, **transports: CheckpointTransport[dict[str, Any]]) -> None:
        self._file = file
        self._transports = transports

    def _chosen(self) -> CheckpointTransport[dict[str, Any]]:
        return self._transports[self._file.read_text()]

    def metadata(self) -> str:
        return self._transports["http"].metadata()

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        self._chosen().send_checkpoint(dst_ranks, step, state_dict, timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        return self._chosen().recv_checkpoint(src_rank, metadata, step, timeout)

    def disallow_checkpoint(self) -> None:
        for transport in self._transports.values():
            transport.disallow_checkpoint()

    def abort(self, reason: str = "the caller gave it up") -> None:
        for transport in self._transports.values():
            transport.abort(reason)

    def shutdown(self, wait: bool = True) -> None:
        for transport in self._transports.values():
            transport.shutdown(wait)


def digest(state: dict[str, Any]) -> str:
    hashed = xxhash.xxh3_128()
    values = [*state["model"].values(), *(v for s in state["optimizer"]["state"].values() for v in s.values())]
    for value in values:
        local = value.to_local() if isinstance(value, DTensor) else value
        hashed.update(local.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    parser.add_argument("--transport-file", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    init_process_group("gloo", timedelta(minutes=30))  # torch's own default timeout

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    torch.manual_seed(ord(args.name))  # groups start from different weights: they must not stay different
    net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    inner = torch.optim.AdamW(net.parameters(), lr=1e-3)
    state = LiveState(net, inner)

    def live() -> dict[str, Any]:
        return {"user": {"default": state.state_dict()}}

    pg = ProcessGroupGloo(timeout=timeout)
    manager = Manager(
        pg=pg,
        load_state_dict=state.load_state_dict,
        state_dict=state.state_dict,
        min_replica_size=1,
        timeout=timeout,
        quorum_timeout=timeout,
        replica_id=args.name,
        checkpoint_transport=Either(
            args.transport_file,
            http=HTTPTransport(timeout, snapshot="lock", state_dict=live),
            pg=PGTransport(pg, timeout, torch.device("cpu"), state_dict=live),
        ),
    )
    replicate(net, manager, end_with_group=GRACE)
    optimizer = Optimizer(manager, inner)

    emit("start", pid=os.getpid())
    generator = torch.Generator().manual_seed(os.getpid())
    while True:
        step = manager.current_step()
        if args.stop_file.exists() and step >= int(args.stop_file.read_text()):
            break
        optimizer.zero_grad()
        net(torch.randn(8, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        emit(
            "step",
            step=manager.current_step(),
            committed=manager.current_step() == step + 1,
            participants=manager.num_participants(),
            error=None if manager.errored() is None else str(manager.errored()),
        )
    emit("end", step=manager.current_step(), hash=digest(state.state_dict()), batches=manager.batches_committed())
    manager.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
