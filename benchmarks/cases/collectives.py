"""What collectives cost between two processes: alone, in a child, in a DDP step, at the end of a window, in bytes."""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.processes import CHILDREN, Cluster, Event

__all__ = ["CASES"]

_MEGABYTES = 25


def _pair(run: Run, script: str, *args: object) -> list[Event]:
    """The results of two members, of which the first has the store."""
    with Cluster() as cluster:
        first = cluster.spawn(run.impl, CHILDREN / script, "--rank", 0, *args)
        first.hello()
        store = first.wait("store", 30)["address"]
        second = cluster.spawn(run.impl, CHILDREN / script, "--rank", 1, "--store", store, *args)
        second.hello()
        results = [child.wait("result", 120) for child in (first, second)]
        for child in (first, second):
            child.tell("stop")
    return results


def _allreduce(group: str, run: Run, *flags: str) -> Figures:
    small, large, configurations = (50, 4, 3) if run.quick else (500, 20, 20)
    times = ["--kilobytes", 1, 65536, "--times", small, large]
    results = _pair(run, "allreduce.py", "--group", group, *times, "--configurations", configurations, *flags)

    def median(kilobytes: str, skipped: int) -> float:
        return 1e3 * statistics.median(s for r in results for s in r["collectives"][kilobytes][skipped:])

    return {
        "1 KB allreduce median, ms": median("1", small // 5),
        "64 MB allreduce median, ms": median("65536", 2),
        "first 64 MB allreduce, ms": 1e3 * max(r["collectives"]["65536"][0] for r in results),
        "first configure, ms": 1e3 * max(r["first"] for r in results),
        "later configure median, ms": 1e3 * statistics.median(s for r in results for s in r["later"]),
    }


def _shared(run: Run) -> Figures:
    return _allreduce("ProcessGroupBabyGloo", run, "--shared")


def _synchronisation(algorithm: str, run: Run) -> Figures:
    windows = 6 if run.quick else 25
    with Cluster() as cluster:
        lighthouse = cluster.lighthouse(run.impl, min_replicas=2)
        children = [
            cluster.spawn(
                run.impl,
                CHILDREN / "local_sgd.py",
                *("--replica", i, "--lighthouse", lighthouse, "--algorithm", algorithm),
                *("--megabytes", _MEGABYTES, "--windows", windows),
            )
            for i in range(2)
        ]
        for child in children:
            child.hello()
        results = [child.wait("result", 120) for child in children]
        for child in children:
            child.tell("stop")
    step = statistics.median(s for r in results for s in r["without"])
    with_sync = statistics.median(s for r in results for s in r["with_sync"][2:])
    return {f"synchronisation of {_MEGABYTES} MB median, ms": 1e3 * (with_sync - step)}


def _quantized(run: Run) -> Figures:
    results = _pair(run, "quantized.py", "--megabytes", 4 if run.quick else 64)
    exact, rounded = (sum(r[how][0] for r in results) for how in ("exact", "quantized"))
    return {
        "bytes quantized / float32": rounded / exact,
        "float32 allreduce, ms": 1e3 * max(r["exact"][1] for r in results),
        "quantized allreduce, ms": 1e3 * max(r["quantized"][1] for r in results),
        "relative error of the sum": max(r["error"] for r in results),
    }


CASES = (
    Case("gloo", "allreduce and configure of ProcessGroupGloo", partial(_allreduce, "ProcessGroupGloo")),
    Case("baby-gloo", "the same of ProcessGroupBabyGloo", partial(_allreduce, "ProcessGroupBabyGloo")),
    Case("shared-baby-gloo", "the same with tensors in shared memory", _shared),
    Case("localsgd", "a synchronisation of LocalSGD", partial(_synchronisation, "localsgd")),
    Case("diloco", "a synchronisation of DiLoCo, one fragment", partial(_synchronisation, "diloco")),
    Case(
        "quantized",
        "bytes of a quantized allreduce of 64 MB on the wire (ours alone)",
        _quantized,
        target="bytes at most 0.27",
        most_peer=0,
    ),
)
