"""One replica group that trains alone and synchronises now and then: what does a synchronisation cost?

A single matrix as model, so that the steps between are short. Says `result` with the seconds of each step that ends in
a synchronisation, and of each that does not.
"""

import argparse
import time

import torch
import torch.distributed as dist
from report import hello, say
from torch import nn

from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo, LocalSGD

EVERY = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--algorithm", choices=["localsgd", "diloco"], required=True)
    parser.add_argument("--megabytes", type=float, required=True)
    parser.add_argument("--windows", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop = hello()
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.manual_seed(0)
    side = int((args.megabytes * 1e6 / 4) ** 0.5)
    model = nn.Sequential(nn.Linear(side, side, bias=False))
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    manager = Manager(
        pg=ProcessGroupGloo(),
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=2,
        use_async_quorum=args.algorithm == "localsgd",
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=f"group{args.replica}",
    )
    if args.algorithm == "localsgd":
        training = LocalSGD(manager, model, inner, sync_every=EVERY)
    else:
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        training = DiLoCo(manager, [model[0]], inner, outer, sync_every=EVERY)
    x = torch.randn(1, side)
    with_sync, without = [], []
    with training:
        while manager.current_step() < args.windows:
            before = manager.current_step()
            for n in range(EVERY):
                start = time.perf_counter()
                inner.zero_grad()
                model(x).square().mean().backward()
                inner.step()
                (with_sync if n == EVERY - 1 else without).append(time.perf_counter() - start)
            if manager.current_step() != before + 1:
                with_sync.pop()
    say("result", with_sync=with_sync, without=without)
    stop.wait()
    manager.shutdown()


if __name__ == "__main__":
    main()
