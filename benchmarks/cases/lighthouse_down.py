"""The only lighthouse is killed while two groups train, and started again at its address some seconds later.

Rules:

- Its defaults are those of the command line. Ours keeps a state file, as its command does.
- A joiner is ready, its imports done, and tries to reach the lighthouse when that comes back.
- Commits and failed steps are counted for `DOWN` seconds, from just before the signal. The gap beside them is that of
  the same time before it.
"""

from __future__ import annotations

import socket
import time

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.training import longest_gap, together, train
from benchmarks.processes import CHILDREN, Child, ChildError, Cluster

__all__ = ["CASES"]

DOWN = 5.0
PATIENCE = 30.0
GROUPS = 2


def _lighthouse(cluster: Cluster, run: Run, port: int) -> tuple[Child, str]:
    state = ("--state-file", cluster.folder / "lighthouse.json") if run.ours else ()
    child = cluster.spawn(run.impl, CHILDREN / "lighthouse.py", 1, 60_000, 5_000, "--bind", f"127.0.0.1:{port}", *state)
    child.hello()
    return child, str(child.wait("address", 30)["address"])


def _down(run: Run) -> Figures:
    with Cluster() as cluster:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        lighthouse, _ = _lighthouse(cluster, run, port)
        address = f"http://127.0.0.1:{port}"
        trainers = [train(cluster, run.impl, i, address) for i in range(GROUPS)]
        for child in trainers:
            child.hello()
        together(trainers, GROUPS)
        for child in trainers:  # a time before that is as long
            begun = child.wait("step", 30, lambda e: e["committed"])["t"]
            child.wait("step", 60, lambda e, begun=begun: e["t"] > begun + DOWN)
        hit = lighthouse.kill()
        figures: Figures = {
            "commits while it is down, fraction": None,
            "failed steps, count": None,
            "longest gap between commits, s": None,
            "the same before, s": None,
            "from its restart to the joiner's first commit, s": None,
        }
        joiner = train(cluster, run.impl, GROUPS, address)
        joiner.hello()
        try:
            for child in trainers:
                child.wait("step", PATIENCE, lambda e: e["t"] > hit + DOWN)
        except ChildError:  # it stands still, or has died
            return figures

        def count(start: float, end: float, committed: bool) -> int:
            events = [e for c in trainers for e in c.all("step")]
            return sum(bool(e["committed"]) == committed and start < e["t"] <= end for e in events)

        figures["commits while it is down, fraction"] = count(hit, hit + DOWN, True) / count(hit - DOWN, hit, True)
        figures["failed steps, count"] = float(count(hit, hit + DOWN, False))
        figures["longest gap between commits, s"] = max(longest_gap(c, hit, hit + DOWN) for c in trainers)
        figures["the same before, s"] = max(longest_gap(c, hit - DOWN, hit) for c in trainers)
        restarted = time.monotonic()
        _lighthouse(cluster, run, port)
        first = joiner.wait("step", PATIENCE, lambda e: e["committed"])
        figures["from its restart to the joiner's first commit, s"] = first["t"] - restarted
        return figures


CASES = (
    Case(
        "lighthouse-down",
        "the only lighthouse is killed while two groups train; it comes back after 5 s, and a group joins",
        _down,
        patience=PATIENCE,
        target="0 failed steps; 8 s",
        most_peer=1,
    ),
)
