"""One replica group (or one rank of it) that trains until it is told to stop, for faults and joins.

A step computes for `--step-ms` (asleep, as a CPU is that waits for its GPU) and averages the gradients of a tiny
model: with `manager.allreduce` parameter by parameter, or with `--ddp` through DistributedDataParallel. The state that
a joiner must receive is `--state-mb` of tensors. Says `quorum` when it first asks for one, and `step` after every step:
the manager's step, whether it committed and with how many participants. Says `state` when it is asked for its state.

Each process has data of its own, so groups are equal only if what they exchange makes them equal.

With `--link` its state is read through a link of the fault injector in this process, which `limit N` makes N bytes a
second slow (this implementation alone has it).

It does what it is told between two steps: `stop`, or `until N` (train to step N, say `end` with a hash of the model,
and wait for `stop`), `raise` (an exception that nobody catches) and `leave`.
"""

import argparse
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
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
        say("state")
        return {"model": self.model.state_dict(), "ballast": self.ballast}

    def load(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        self.model.load_state_dict(state["model"])
        for name, tensor in self.ballast.items():
            tensor.copy_(state["ballast"][name])

    def digest(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Orders:
    """What the parent asked for and the loop has still to do."""

    def __init__(self) -> None:
        self.until: int | None = None
        self.act = ""
        self.limit: Callable[[float | None], None] = lambda rate: None

    def hear(self, line: str) -> None:
        word, _, number = line.partition(" ")
        if word == "until":
            self.until = int(number)
        elif word == "limit":
            self.limit(float(number) or None)
        else:
            self.act = word


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--store-port", type=int, default=0, help="of the group's store; 0: host it")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--ddp", action="store_true")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--state-mb", type=int, default=0)
    parser.add_argument("--transport", choices=("http", "pg"), default="http")
    parser.add_argument("--link", action="store_true", help="the state is read through a link that can be limited")
    parser.add_argument("--timeout", type=float, default=0.0, help="of everything, seconds; 0: the defaults")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    orders = Orders()
    stop = hello(orders.hear)

    state = State(args.state_mb)
    store = None
    if not args.store_port:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    limits = {}
    timeout = timedelta(seconds=args.timeout or 60)
    if args.timeout:
        limits = {"timeout": timeout, "quorum_timeout": timeout}
    pg = ProcessGroupGloo(timeout=timeout) if args.timeout else ProcessGroupGloo()
    transport = None  # the manager's default: HTTP
    links = contextlib.ExitStack()
    if args.link:
        from torchft.checkpointing import HTTPTransport
        from torchft.testing.faults import Link

        def all_state() -> dict[str, object]:
            return {"user": {"default": state.save()}, "torchft": manager.state_dict()}

        transport = HTTPTransport(timeout, snapshot="lock", hostname="127.0.0.1", state_dict=all_state)
        link = links.enter_context(Link(transport.metadata().rpartition("http://")[2]))
        orders.limit = link.throttle
        transport.metadata = lambda: f"torchft-http/1 http://{link.address}"
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
        rank=args.rank,
        world_size=args.world_size,
        store_addr="localhost",
        store_port=args.store_port if store is None else store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=f"group{args.replica}",
        checkpoint_transport=transport,
        **limits,
    )
    model = DistributedDataParallel(manager, state.model) if args.ddp else state.model
    optimizer = Optimizer(manager, torch.optim.SGD(state.model.parameters(), lr=1e-3))
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(os.getpid()))

    say("quorum")
    while not stop.is_set():
        before = manager.current_step()
        if orders.until is not None and before >= orders.until:
            say("end", step=before, hash=state.digest())
            stop.wait()
            break
        if orders.act == "raise":
            raise RuntimeError("told to fail")
        if orders.act == "leave":
            if hasattr(manager, "leave"):  # elsewhere there is only to go
                manager.leave("told to leave")
            break
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
    links.close()


if __name__ == "__main__":
    main()
