"""What one change of the members costs, by the number of groups: a lighthouse and thousands of simulated members.

The members (`benchmarks/children/members.py`) are one process of real connections in front of a lighthouse process of
either implementation; what answers them is the only thing that differs. Ours keep sessions, the peer's ask by calls.
"""

from __future__ import annotations

import os
import statistics
from functools import partial
from pathlib import Path

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.processes import CHILDREN, OURS, Cluster

__all__ = ["CASES"]

_STAND = 10.0
"""Seconds in which the quorum stands and the lighthouse's processor time is counted."""


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def change(groups: int, changes: int, run: Run) -> Figures:
    """Joiners are taken into a quorum of ``groups``, one after the other. Figures are the medians of all."""
    stand = 0.0 if not run.ours else 2.0 if run.quick else _STAND
    with Cluster() as cluster:
        # Members of ours send a sign of life each second, as with a timeout of 5 s, those of the peer none. But one
        # process that stands for thousands of hosts is sometimes silent for longer, and is not to be missed for it.
        lighthouse = cluster.spawn(run.impl, CHILDREN / "lighthouse.py", groups, 60_000, 60_000)
        pid = int(lighthouse.hello()["pid"])
        address = lighthouse.wait("address", 30)["address"]
        flags = ("--standing", "--stand", stand) if run.ours else ()
        flags += ("--changes", 1 if run.quick else changes)
        # The members speak the protocol of both: they are the same program, whatever the lighthouse is.
        members = cluster.spawn(OURS, CHILDREN / "members.py", "--lighthouse", address, "--groups", groups, *flags)
        members.hello()
        figures: Figures = {}
        if run.ours:
            members.wait("stands", 120)
            before = _cpu(pid)
            members.wait("stood", 60)
            figures["lighthouse while all stand, cores"] = (_cpu(pid) - before) / stand
        members.wait("changed", 150)
        seen = members.all("change")
        figures |= {
            "training stands still, ms": 1e3 * statistics.median(c["standstill"] for c in seen),
            "lighthouse's memory, MB": _peak_mb(pid),
        }
        if run.ours:
            joining = statistics.median(c["joining"] for c in seen)
            figures["from the joiner's question to the last answer, ms"] = 1e3 * joining
        members.tell("stop")
        members.end(60)
    return figures


CASES = tuple(
    Case(f"change-{n}", f"a joiner is taken in by {n} simulated groups", partial(change, n, changes), target=target)
    for n, changes, target in (
        (16, 21, "at most the peer's"),
        (256, 9, "half of the peer's"),
        (1024, 3, "a third of the peer's; under 0.25 cores while all stand"),
        (4096, 1, "a tenth of the peer's; memory under 400 MB"),
    )
)
