"""The lighthouse that leads is killed, or stopped, and another one stands by. Only ours has standbys.

Rules:

- A real etcd on loopback, two lighthouses as processes with the defaults of their command line (lease 5 s).
- Timed from just before the signal. The groups that ask do so at once after it.
- For groups in training: every commit and every failed step is counted until each has `MORE` commits after the standby
  has begun to lead.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import longest_gap, together, train
from benchmarks.etcd import running_etcd
from benchmarks.processes import CHILDREN, Child, Cluster

__all__ = ["CASES"]

PATIENCE = 30.0
GROUPS = 2
MORE = 20
DEFAULTS = (60_000, 5_000, "--ha")


@contextmanager
def lighthouses(cluster: Cluster, run: Run, min_replicas: int = 1) -> Iterator[tuple[Child, Child, str]]:
    """The one that leads, the one that stands by, and the addresses of both."""
    with running_etcd(cluster.folder) as etcd:
        found = []
        for _ in range(2):
            child = cluster.spawn(run.impl, CHILDREN / "lighthouse.py", min_replicas, *DEFAULTS, etcd.url("bench"))
            child.hello()
            found.append((child, str(child.wait("address", 30)["address"])))
            if len(found) == 1:
                child.wait("leads", 30)
        (leader, first), (standby, second) = found
        yield leader, standby, f"{first},{second}"


def asked(run: Run, stop: bool) -> Figures:
    """How long groups that need a quorum in that moment wait for it."""
    with Cluster() as cluster, lighthouses(cluster, run, GROUPS) as (leader, standby, addresses):
        askers = cluster.spawn(run.impl, CHILDREN / "askers.py", addresses, GROUPS)
        askers.hello()
        askers.wait("ready", 30)
        askers.tell("ask")
        askers.wait("asked", 30)
        before = len(askers.all("quorum"))
        hit = leader.pause() if stop else leader.kill()
        askers.tell("ask")
        leads = float(standby.wait("leads", PATIENCE)["t"])
        askers.wait("asked", PATIENCE, lambda e: e["t"] > hit)
        if len(askers.all("quorum")) < before + GROUPS:
            raise askers.error("had no quorum")
        answered = [float(e["t"]) for e in askers.all("quorum")[before:]]
        return {"to the standby leading, s": leads - hit, "to its first quorum, s": max(answered) - hit}


def trained(run: Run, stop: bool) -> Figures:
    """What groups in training see of it."""
    with Cluster() as cluster, lighthouses(cluster, run) as (leader, standby, addresses):
        children = [train(cluster, run.impl, i, addresses) for i in range(GROUPS)]
        for child in children:
            child.hello()
        together(children, GROUPS)
        hit = leader.pause() if stop else leader.kill()
        leads = float(standby.wait("leads", PATIENCE)["t"])
        for child in children:
            last = child.wait("step", PATIENCE, lambda e: e["committed"] and e["t"] > leads)["step"]
            child.wait("step", PATIENCE, lambda e, last=last: e["step"] >= last + MORE)
        end = time.monotonic()
        before = [[e["t"] for e in c.all("step") if e["committed"] and hit - 1.0 < e["t"] < hit] for c in children]
        calm = max(b - a for commits in before for a, b in itertools.pairwise(commits))
        return {
            "longest gap between commits, s": max(longest_gap(c, hit, end) for c in children),
            "the same in the second before, s": calm,
            "failed steps, count": float(
                sum(not e["committed"] for c in children for e in c.all("step") if e["t"] > hit)
            ),
        }


CASES = tuple(
    Case(name, about, measure, patience=PATIENCE, target=target, only_ours=True)
    for name, about, measure, target in (
        ("standby-kill", "the lighthouse that leads is killed; groups ask at once", partial(asked, stop=False), "1 s"),
        ("standby-stop", "the same, stopped (SIGSTOP)", partial(asked, stop=True), "lease (5 s) + 1 s"),
        (
            "standby-kill-train",
            "the lighthouse that leads is killed; two groups train",
            partial(trained, stop=False),
            "0 failed steps",
        ),
        ("standby-stop-train", "the same, stopped (SIGSTOP)", partial(trained, stop=True), "0 failed steps"),
    )
)
