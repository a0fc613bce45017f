"""One replica group of one process that trains until it is told to stop, for kills and joins.

A step computes for `--step-ms` (asleep, as a CPU is that waits for its GPU) and averages the gradients of a tiny
model: with `manager.allreduce` parameter by parameter, or with `--ddp` through DistributedDataParallel. The state that
a joiner must receive is `--state-mb` of tensors. Says `quorum` when it first asks for one, and `step` after every step:
the manager's step, whether it committed and with how many participants.
"""

import argparse
import time
from datetime import timedelta

import torch
from report import hello, say
from torch import nn
from torch.distributed import TCPStore

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.checkpointing.pg_transport import PGTransport

MIB = 1 << 20


class State:
    """The tiny model that trains and the ballast that makes its state as large as asked for."""

    def __init__(self, mib: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        count = max(1, min(64, mib // 2))
        self.ballast = {f"layer{i}": torch.ones(mib * MIB // count // 4) for i in range(count if mib else 0)}

    def save(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "ballast": self.ballast}

    def load(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        self.model.load_state_dict(state["model"])
        for name, tensor in self.ballast.items():
            tensor.copy_(state["ballast"][name])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--ddp", action="store_true")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--state-mb", type=int, default=0)
    parser.add_argument("--transport", choices=("http", "pg"), default="http")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()

    state = State(args.state_mb)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pg = ProcessGroupGloo()
    timeout = timedelta(seconds=60)
    transport = None  # the manager's default: HTTP
    if args.transport == "pg":

        def receive_into() -> dict[str, object]:
            return {"user": {"default": state.save()}, "torchft": manager.state_dict()}

        transport = PGTransport(pg, timeout=timeout, device=torch.device("cpu"), state_dict=receive_into)
    manager = Manager(
        pg=pg,
        load_state_dict=state.load,
        state_dict=state.save,
        min_replica_size=1,
        use_async_quorum=not args.sync,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=f"group{args.replica}",
        checkpoint_transport=transport,
    )
    model = DistributedDataParallel(manager, state.model) if args.ddp else state.model
    optimizer = Optimizer(manager, torch.optim.SGD(state.model.parameters(), lr=1e-3))
    x = torch.randn(16, 32)

    say("quorum")
    while not stop.is_set():
        before = manager.current_step()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        time.sleep(args.step_ms / 1e3)
        loss.backward()
        if not args.ddp:
            for work in [manager.allreduce(p.grad) for p in model.parameters()]:
                work.wait()
        optimizer.step()
        say(
            "step",
            step=manager.current_step(),
            committed=manager.current_step() > before,
            participants=manager.num_participants(),
        )
    manager.shutdown()
    say("end")


if __name__ == "__main__":
    main()
