"""A trainer that tests kill: one rank of one replica group, a small multi-bucket model on made-up data.

It prints a JSON line per event, kills itself with SIGKILL at a named phase of a named step if told to, and trains until
the file ``--stop-file`` names a step and that step is committed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.checkpointing import Checkpoints, HTTPTransport
from torchft.checkpointing.offer import Offer
from torchft.checkpointing.pg_transport import PGTransport
from torchft.testing.faults import Injector

PHASES = ["quorum", "configure", "forward", "backward", "vote", "commit", "send", "receive"]


def emit(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
    sys.stdout.flush()


def fork_and_live_on() -> None:
    child = os.fork()
    if child == 0:
        parent = os.getppid()
        while True:  # a minute after its parent at the latest, whatever the test forgets
            time.sleep(60)
            if os.getppid() != parent:
                os._exit(0)
    emit("forked", pid=child)


def after(owner: Any, method: str, act: Callable[..., None]) -> None:
    """Calls ``act`` with the arguments of each call of ``owner.method`` after it."""
    real = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        act(*args, **kwargs)
        return result

    setattr(owner, method, call)


def before(owner: Any, method: str, act: Callable[[], None]) -> None:
    """Calls ``act`` before each call of ``owner.method``."""
    real = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        act()
        return real(*args, **kwargs)

    setattr(owner, method, call)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    parser.add_argument(
        "--transport", choices=["http", "pg", "default"], default="http", help="default: what a Manager makes by itself"
    )
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--die", default="", help="PHASE@STEP, or PHASE@+N: after N steps of its own")
    parser.add_argument("--stop-instead", action="store_true", help="--die only stops the process (SIGSTOP)")
    parser.add_argument("--faults", default="", help="a plan of torchft.testing.faults, for this process")
    parser.add_argument("--leave", type=int, default=0, help="leave before this step")
    parser.add_argument("--hang-at", type=int, default=0, help="never come back from the forward pass of this step")
    parser.add_argument("--quorum-retries", type=int, default=0)
    parser.add_argument("--drain", action="store_true", help="SIGTERM ends it between two steps")
    parser.add_argument("--fork", type=int, default=0, help="so many children that live on, as data loaders do")
    parser.add_argument("--state-mb", type=int, default=0, help="ballast that a joiner has to receive")
    parser.add_argument("--heartbeat-only", action="store_true", help="without sessions")
    parser.add_argument("--checkpoints", type=Path, help="where to save the state, and to restore it from")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="length of the forward pass")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, sys.stderr)  # a test that waits in vain asks where the threads are

    torch.manual_seed(os.getpid())  # groups start from different weights: they must not stay different
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 8))
    inner = torch.optim.AdamW(net.parameters(), lr=1e-3)
    ballast = {f"ballast{i}": torch.zeros(1 << 18) for i in range(args.state_mb)}

    def save() -> dict[str, Any]:
        return {"model": net.state_dict(), "optim": inner.state_dict(), "ballast": ballast}

    def load(state: dict[str, Any]) -> None:
        net.load_state_dict(state["model"])
        inner.load_state_dict(state["optim"])

    timeout = timedelta(seconds=args.timeout)
    pg = ProcessGroupGloo(timeout=timeout)
    transport: Any = HTTPTransport(timeout) if args.transport == "http" else None
    if args.transport == "pg":
        transport = PGTransport(pg, timeout, torch.device("cpu"), state_dict=lambda: {"user": {"default": save()}})
    manager = Manager(
        pg=pg,
        load_state_dict=load,
        state_dict=save,
        min_replica_size=1,
        use_async_quorum=not args.sync,
        timeout=timeout,
        quorum_timeout=timeout,
        replica_id=args.name,
        checkpoint_transport=transport,
        quorum_retries=args.quorum_retries,
        drain=args.drain,
        proactive_recovery=not args.heartbeat_only,
        checkpoints=Checkpoints(args.checkpoints, every=args.every) if args.checkpoints else None,
    )
    model = DistributedDataParallel(manager, net, bucket_cap_mb=0.02)
    optimizer = Optimizer(manager, inner)

    phase, _, at = args.die.partition("@")

    steps = 0

    def die() -> None:
        if (steps if at.startswith("+") else manager.current_step()) >= int(at):
            emit("dies", phase=phase, step=manager.current_step())
            os.kill(os.getpid(), signal.SIGSTOP if args.stop_instead else signal.SIGKILL)

    if phase == "quorum":
        before(manager, "start_quorum", die)
    elif phase == "configure":
        before(pg, "configure", die)
    elif phase == "forward":
        net.register_forward_pre_hook(lambda *_: die())
    elif phase == "backward":  # some buckets are on their way, some are not
        net[4].weight.register_hook(lambda g: die())
    elif phase == "vote":
        before(manager, "should_commit", die)
    elif phase == "commit":
        before(inner, "step", die)
    elif phase == "send":
        before(transport, "send_checkpoint", die)
    elif phase == "half":  # when half of a state has left
        after(Offer, "sent", lambda offer, *_: die() if 2 * offer.bytes_sent >= offer.cut.total else None)
    elif phase == "receive":
        before(transport, "recv_from_many" if args.transport == "http" else "recv_checkpoint", die)

    after(Checkpoints, "save", lambda _, step, *__, **___: emit("saves", step=step))
    emit("start", pid=os.getpid(), replica_id=manager.replica_id())
    if args.faults:
        Injector(args.faults, name=manager.replica_id()).attach(manager)
    generator = torch.Generator().manual_seed(os.getpid())
    while True:
        step = manager.current_step()
        if steps == 3:
            for _ in range(args.fork):
                fork_and_live_on()
        if args.leave and step >= args.leave:
            manager.leave("it has seen enough")
            emit("left", step=step)
            threading.Event().wait()  # gone for the others, though the process lives
        steps += 1
        if args.stop_file.exists() and step >= int(args.stop_file.read_text()):
            break
        batch = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        if args.hang_at and manager.num_participants() > 1 and step >= args.hang_at:
            emit("hangs", step=step)
            threading.Event().wait()
        if args.step_seconds:
            time.sleep(args.step_seconds)
        model(batch).square().mean().backward()
        optimizer.step()
        emit(
            "step",
            step=manager.current_step(),
            committed=manager.current_step() == step + 1,
            healed=manager.current_step() > step + 1,
            participants=manager.num_participants(),
            error=None if manager.errored() is None else str(manager.errored()),
        )
    digest = xxhash.xxh3_128()
    state = save()
    for tensor in [*state["model"].values(), *(v for s in state["optim"]["state"].values() for v in s.values())]:
        digest.update(tensor.contiguous().numpy().tobytes())
    emit("end", step=manager.current_step(), hash=digest.hexdigest(), batches=manager.batches_committed())
    manager.shutdown()


if __name__ == "__main__":
    main()
