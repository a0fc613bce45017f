"""A small training run, written against the public API only: it runs with either implementation (PYTHONPATH decides).

One group of one process. Each group starts from weights of its own and trains on data of its own, so two groups hold
the same state only if both the healing and the averaging between them worked. Says `healed` when it received a state
and `step` after every step, with a hash of model and optimizer.
"""

import argparse
import hashlib
import time
from datetime import timedelta
from pathlib import Path

import torch
from folder_transport import FolderTransport
from report import hello, say
from torch import nn
from torch.distributed import TCPStore

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.checkpointing.pg_transport import PGTransport


def state_hash(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            digest.update(momentum.numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--replica", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="share states through this folder")
    parser.add_argument("--pg-transport", action="store_true")
    parser.add_argument("--ddp", action="store_true")
    parser.add_argument("--sync", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()

    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def load(state: dict[str, dict[str, object]]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])
        say("healed")

    timeout = timedelta(seconds=20)
    pg = ProcessGroupGloo(timeout=timeout)
    transport = None
    if args.folder is not None:
        transport = FolderTransport(args.folder)
    elif args.pg_transport:
        transport = PGTransport(pg, timeout=timeout, device=torch.device("cpu"))
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=pg,
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        use_async_quorum=not args.sync,
        timeout=timeout,
        quorum_timeout=timeout,
        connect_timeout=timeout,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=args.replica,
        checkpoint_transport=transport,
    )
    forward = DistributedDataParallel(manager, model) if args.ddp else model
    optimizer = Optimizer(manager, inner)

    while not stop.is_set():
        before = manager.current_step()
        optimizer.zero_grad()
        loss = forward(torch.randn(8, 16)).square().mean()
        time.sleep(0.01)  # what a GPU would compute
        loss.backward()
        if not args.ddp:
            for work in [manager.allreduce(p.grad) for p in model.parameters()]:
                work.wait()
        optimizer.step()
        error = manager.errored()
        say(
            "step",
            step=manager.current_step(),
            committed=manager.current_step() > before,
            participants=manager.num_participants(),
            hash=state_hash(model, inner),
            error=None if error is None else f"{type(error).__name__}: {error}",
        )
    manager.shutdown()
    say("end")


if __name__ == "__main__":
    main()
