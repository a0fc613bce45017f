"""One fault, and the time until the groups that are left commit without the one that it hit.

Rules:

- The moment in the step and the victim are drawn by the run's number: the same for both implementations.
- Timed from just before the signal to the first commit, of the slowest survivor, whose participants are the survivors.
- Timeouts are the defaults of Manager, process group and the lighthouse's command line where a case names no other.
"""

from __future__ import annotations

import random
import time
from functools import partial

from torch.distributed import TCPStore

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import STEP_MS, commit_without, longest_gap, together, train
from benchmarks.processes import Child, Cluster

__all__ = ["CASES"]

PATIENCE = 75.0
"""Longer than every default timeout, which is 60 s."""


def _without(survivors: list[Child], what: str, hit: float, groups: int) -> Figures:
    back = commit_without(survivors, hit, groups - 1, PATIENCE)
    gap = None
    if back is not None:
        gap = max(longest_gap(c, hit, back) for c in survivors)
    return {f"{what} to commit without it, s": back and back - hit, "longest gap between commits, s": gap}


def kill(run: Run, groups: int, *args: object, join_timeout_ms: int = 60_000) -> Figures:
    rng = random.Random(f"{groups} {run.index}")
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl, join_timeout_ms=join_timeout_ms)
        children = [train(cluster, run.impl, i, lighthouse, *args) for i in range(groups)]
        for child in children:
            child.hello()
        together(children, groups)
        victim = children.pop(rng.randrange(groups))
        time.sleep(rng.uniform(0, 2 * STEP_MS / 1e3))
        return _without(children, "kill", victim.kill(), groups)


def stop(run: Run, heartbeat_timeout_ms: int = 5_000, peer_timeout_s: float | None = None) -> Figures:
    """The process is there and does nothing more, as a hung host."""
    rng = random.Random(f"stop {run.index}")
    args = () if peer_timeout_s is None or run.ours else ("--timeout", peer_timeout_s)
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl, heartbeat_timeout_ms=heartbeat_timeout_ms)
        children = [train(cluster, run.impl, i, lighthouse, *args) for i in range(2)]
        for child in children:
            child.hello()
        together(children, 2)
        victim = children.pop(rng.randrange(2))
        time.sleep(rng.uniform(0, 2 * STEP_MS / 1e3))
        try:
            return _without(children, "stop", victim.pause(), 2)
        finally:
            victim.kill()


def kill_rank(run: Run, rank: int) -> Figures:
    """Two groups of two ranks. The rest of the hit group lives on and cannot train."""
    rng = random.Random(f"rank {rank} {run.index}")
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl)
        # Outside of the ranks, as a launcher's agent has it.
        stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
        groups = [
            [
                train(
                    cluster,
                    run.impl,
                    i,
                    lighthouse,
                    *("--rank", r, "--world-size", 2, "--store-port", store.port),
                    name=f"group{i}-rank{r}",
                )
                for r in range(2)
            ]
            for i, store in enumerate(stores)
        ]
        ranks = [child for group in groups for child in group]
        for child in ranks:
            child.hello()
        together(ranks, 2)
        hit = groups.pop(rng.randrange(2))
        time.sleep(rng.uniform(0, 2 * STEP_MS / 1e3))
        return _without(groups[0], "kill", hit[rank].kill(), 2)


CASES = tuple(
    Case(name, about, measure, patience=PATIENCE, target=target, most_peer=most_peer)
    for name, about, measure, target, most_peer in (
        ("kill-2", "one of two groups is killed", partial(kill, groups=2), "0.25 s", None),
        (
            "kill-2-ddp",
            "the same, training with DistributedDataParallel",
            lambda r: kill(r, 2, "--ddp"),
            "0.25 s",
            None,
        ),
        ("kill-3", "one of three groups is killed", partial(kill, groups=3), "0.15 s", None),
        (
            "kill-3-join100",
            "the same, lighthouse with join_timeout_ms=100",
            partial(kill, groups=3, join_timeout_ms=100),
            "0.15 s",
            None,
        ),
        ("kill-rank0", "rank 0 of one of two groups of two ranks is killed", partial(kill_rank, rank=0), "0.25 s", 1),
        ("kill-rank1", "the same, rank 1", partial(kill_rank, rank=1), "0.25 s", 1),
        ("stop-2", "one of two groups is stopped (SIGSTOP)", stop, "5.3 s", 1),
        (
            "stop-2-hb1000",
            "the same, heartbeat_timeout_ms=1000; the peer with all its timeouts at 2 s",
            partial(stop, heartbeat_timeout_ms=1_000, peer_timeout_s=2.0),
            "1.3 s",
            None,
        ),
    )
)
