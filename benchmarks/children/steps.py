"""One replica group of one process, stepping as fast as it can: what does a step cost?

`--plain` is the yardstick: the same model, optimizer and loop under torch's own DistributedDataParallel over gloo.
Otherwise: a Manager with default settings, OptimizerWrapper and DistributedDataParallel, as a user writes it. Says
`result` with the seconds of every step and the processor time of all; then runs as many steps with the parts of a step
called one by one, and gives the seconds of the quorum (start_quorum and wait_quorum) and of the commit (should_commit).
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from report import hello, say
from torch import nn

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo


def build(megabytes: float) -> nn.Module:
    """A tiny model, with ``megabytes`` MB of parameters between its layers."""
    torch.manual_seed(0)
    if megabytes:
        side = int((megabytes * 1e6 / 4 / 4) ** 0.5)  # four of them: gradients arrive one after the other
        return nn.Sequential(nn.Linear(32, side), *(nn.Linear(side, side) for _ in range(4)), nn.Linear(side, 8))
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def plain(args: argparse.Namespace) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{args.rendezvous}", rank=args.replica, world_size=args.replicas
    )
    model = nn.parallel.DistributedDataParallel(build(args.megabytes))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(16, 32)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(args.warmup):
        step()
    cpu = time.process_time()
    steps = timed(step, args.steps)
    say("result", steps=steps, cpu=time.process_time() - cpu, quorum=[], commit=[], committed=args.steps)
    dist.destroy_process_group()


def timed(step: Callable[[], None], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def tolerant(args: argparse.Namespace) -> Manager:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    model = build(args.megabytes)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    manager = Manager(
        pg=ProcessGroupGloo(),
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=args.replicas,
        use_async_quorum=not args.sync,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=f"group{args.replica}",
    )
    ddp = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, inner)
    x = torch.randn(16, 32)

    def step() -> None:
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()

    while manager.current_step() < args.warmup:
        step()
    first = manager.current_step()
    cpu = time.process_time()
    steps = timed(step, args.steps)
    cpu = time.process_time() - cpu
    committed = manager.current_step() - first

    quorum, commit = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        manager.start_quorum()
        manager.wait_quorum()
        quorum.append(time.perf_counter() - start)
        inner.zero_grad()
        ddp(x).square().mean().backward()
        start = time.perf_counter()
        if manager.should_commit():
            commit.append(time.perf_counter() - start)
            inner.step()
    say("result", steps=steps, cpu=cpu, quorum=quorum, commit=commit, committed=committed)
    return manager


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--megabytes", type=float, default=0.0, help="of parameters, instead of a tiny model")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--lighthouse", default="")
    parser.add_argument("--rendezvous", default="", help="a file of the folder they share, for --plain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()
    if args.plain:
        plain(args)
        stop.wait()
        return
    manager = tolerant(args)
    stop.wait()
    manager.shutdown()


if __name__ == "__main__":
    main()
