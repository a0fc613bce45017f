"""One of four processes that train the same models twice: as one job of four ranks by torch alone, then as two groups
of two ranks by torchft. It prints a JSON line with what each of them ended with.

The environment names the world (``WORLD_PORT``, ``WORLD_RANK``) and the group (as torchrun does).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import xxhash
from torch import nn
from torch.distributed import ReduceOp, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchft import DistributedDataParallel, Manager, ProcessGroupGloo
from torchft.parallel import replicate
from torchft.process_group import ManagedProcessGroup, ft_init_device_mesh

STEPS = 3
WIDTH = 10
TIMEOUT = timedelta(seconds=60)

Sync = Callable[[nn.Module, bool], Any]
"""Called before each micro-batch with whether it is the last one of its step."""


def emit(what: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"what": what, **fields}) + "\n")
    sys.stdout.flush()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 14)
        self.down = nn.Linear(14, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


def model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH))


def batch(rank: int, step: int, micro: int = 0) -> torch.Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1000 * micro + 10 * step + rank))


def loss_of(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (net(x) - x.roll(1, dims=1)).square().mean()
    return loss


def sharded(mesh: DeviceMesh, **kwargs: Any) -> nn.Sequential:
    net = model()
    for block in net[:2]:
        fully_shard(block, mesh=mesh, **kwargs)
    fully_shard(net, mesh=mesh, **kwargs)
    return net


def train(
    net: nn.Module,
    rank: int,
    manager: Manager | None = None,
    micro_batches: int = 1,
    sync: Sync = lambda net, last: nullcontext(),
    clip: bool = True,
) -> list[torch.Tensor]:
    """Returns this rank's part of the parameters.

    Args:
        clip: the norm of the gradients; torch can only do it where all or none of them are DTensors of one mesh.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=clip)
    for step in range(STEPS):
        if manager is not None:
            manager.start_quorum()
        optimizer.zero_grad()
        for micro in range(micro_batches):
            with sync(net, micro == micro_batches - 1):
                loss_of(net, batch(rank, step, micro)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)  # reads the gradients: they are averaged by now
        if manager is not None:
            assert manager.should_commit(), manager.errored()
            assert manager.num_participants() == 2
        optimizer.step()
    return [p.to_local() if isinstance(p, DTensor) else p for p in net.parameters()]


def digest(tensors: list[torch.Tensor]) -> str:
    hashed = xxhash.xxh3_128()
    for tensor in tensors:
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def whole(net: nn.Module) -> list[list[float]]:
    """Every parameter, collected from all ranks that have a part of it."""
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return [p.detach().flatten().tolist() for p in full]


def require_all_reduce(net: Any, last: bool) -> Any:
    net.set_requires_all_reduce(last)
    return nullcontext()


def require_gradient_sync(net: Any, last: bool) -> Any:
    net.set_requires_gradient_sync(last)
    return nullcontext()


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SHARDED: dict[str, tuple[dict[str, Any], int, Sync]] = {
    "plain": ({}, 1, lambda net, last: nullcontext()),
    "mixed precision, whole until backward": (
        {"mp_policy": MIXED, "reshard_after_forward": False},
        1,
        lambda net, last: nullcontext(),
    ),
    "bf16 reduction": (
        {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)},
        1,
        lambda net, last: nullcontext(),
    ),
    "accumulating shards": ({}, 3, require_all_reduce),
    "accumulating whole gradients": ({}, 3, require_gradient_sync),
}
"""Arguments of ``fully_shard``, micro-batches a step, what is called before each."""


def by_torch(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    for name, (kwargs, micro_batches, sync) in SHARDED.items():
        net = sharded(mesh, **kwargs)
        emit(f"torch: {name}", digest=digest(train(net, rank, None, micro_batches, sync)))
    ddp = nn.parallel.DistributedDataParallel(model())
    train(ddp, rank)
    emit("torch: ddp", values=whole(ddp))
    average = model()  # of the batches 0 and 1, in one process
    optimizer = torch.optim.AdamW(average.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(average, torch.cat([batch(0, step), batch(1, step)])).backward()
        optimizer.step()
    emit("torch: one process", values=whole(average))


def tensor_parallel(mesh: DeviceMesh) -> nn.Sequential:
    net = model()
    for block in net[:2]:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def by_torchft(rank: int, group: int, manager: Manager) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    for name, (kwargs, micro_batches, sync) in SHARDED.items():
        net = sharded(mesh, **kwargs)
        replicate(net, manager)
        emit(f"replicate: {name}", digest=digest(train(net, rank, manager, micro_batches, sync)))
    net = sharded(mesh)
    accumulating = replicate(net, manager)
    shards = train(net, rank, manager, 3, lambda _, last: nullcontext() if last else accumulating.no_sync())
    emit("replicate: no_sync", digest=digest(shards))

    # As torchtitan does it: a managed group by name, in a hook of its own and for the loss.
    managed = ManagedProcessGroup(manager)
    managed.register("dp_replicate")

    def average(output: torch.Tensor) -> None:
        dist.all_reduce(output, group=managed, op=ReduceOp.AVG)

    net = sharded(mesh)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)
    emit("hook: plain", digest=digest(train(net, rank, manager)))
    loss = torch.tensor(float(group))
    means = [funcol.all_reduce(loss, reduceOp=op, group=managed).item() for op in ("avg", "max", "min", "sum")]
    by_name = funcol.all_reduce(loss, "sum", "dp_replicate").item()
    emit("loss", values=[*means, by_name, loss.item()])
    managed.unregister()

    # As HSDP on a device mesh with the groups as a dimension.
    two = ft_init_device_mesh(
        device_type="cpu",
        mesh_shape=(2, 2),
        mesh_dim_names=("dp_replicate", "dp_shard"),
        replicate_dim=0,
        manager=manager,
    )
    for name, (kwargs, micro_batches, sync) in SHARDED.items():
        net = sharded(two, **kwargs)
        emit(f"mesh: {name}", digest=digest(train(net, rank, manager, micro_batches, sync)))

    wrapped = DistributedDataParallel(manager, model(), process_group=dist.group.WORLD)
    train(wrapped, rank, manager)
    emit("ddp", values=whole(wrapped))

    # Tensor parallel ranks have the batch of their group.
    tp = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    net = tensor_parallel(tp)
    replicate(net, manager)
    train(net, group, manager, clip=False)
    emit("tensor parallel", values=whole(net))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))
    net = tensor_parallel(both["tp"])
    fully_shard(net, mesh=both["dp_shard"])
    replicate(net, manager)
    train(net, group, manager, clip=False)
    emit("tensor parallel in FSDP", values=whole(net))


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["WORLD_RANK"])
    group, group_rank = divmod(rank, 2)
    store = TCPStore("127.0.0.1", int(os.environ["WORLD_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=TIMEOUT)
    by_torch(rank)
    dist.destroy_process_group()

    dist.init_process_group("gloo", timeout=TIMEOUT)
    assert (dist.get_rank(), dist.get_world_size()) == (group_rank, 2)
    manager = Manager(
        ProcessGroupGloo(timeout=TIMEOUT),
        None,
        None,
        min_replica_size=2,
        init_sync=False,  # all begin with the same weights
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        replica_id=f"group{group}",
    )
    by_torchft(rank, group, manager)
    manager.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
