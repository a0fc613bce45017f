"""What a step costs when nothing happens, beside plain DDP."""

from __future__ import annotations

import statistics

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.processes import CHILDREN, Cluster, Event

__all__ = ["CASES"]


def _steps(run: Run, *flags: object, fewer: int = 1) -> list[Event]:
    steps, warmup = (100 // fewer, 20 // fewer) if run.quick else (1000 // fewer, 100 // fewer)
    with Cluster() as cluster:
        where: tuple[object, ...] = ("--rendezvous", cluster.folder / "rendezvous")
        if "--plain" not in flags:
            where = ("--lighthouse", cluster.lighthouse(run.impl, min_replicas=2))
        children = [
            cluster.spawn(
                run.impl, CHILDREN / "steps.py", "--replica", i, "--steps", steps, "--warmup", warmup, *where, *flags
            )
            for i in range(2)
        ]
        for child in children:
            child.hello()
        results = [child.wait("result", 120) for child in children]
        for child in children:
            child.tell("stop")
        for child in children:
            if child.end(90) != 0:
                raise child.error("failed at its end")
    return results


def _step_figures(results: list[Event]) -> Figures:
    seconds = [s for r in results for s in r["steps"]]
    figures = {
        "step mean, ms": 1e3 * statistics.fmean(seconds),
        "step median, ms": 1e3 * statistics.median(seconds),
        "step p99, ms": 1e3 * statistics.quantiles(seconds, n=100)[98],
        "processor time of a step, ms": 1e3 * statistics.fmean(r["cpu"] / len(r["steps"]) for r in results),
    }
    for part in ("quorum", "commit"):
        if results[0][part]:
            figures[f"{part} median, ms"] = 1e3 * statistics.median(s for r in results for s in r[part])
    for r in results:
        if r["committed"] != len(r["steps"]):
            raise RuntimeError(f"only {r['committed']} of {len(r['steps'])} steps committed")
    return figures


def step_plain(run: Run) -> Figures:
    return _step_figures(_steps(run, "--plain"))


def step_async(run: Run) -> Figures:
    return _step_figures(_steps(run))


def step_sync(run: Run) -> Figures:
    return _step_figures(_steps(run, "--sync"))


def step_25mb(run: Run) -> Figures:
    figures = _step_figures(_steps(run, "--megabytes", 25, fewer=10))
    return {name: value for name, value in figures.items() if name.startswith("step")}


CASES = (
    Case("step-plain", "a step of plain DDP over gloo, two processes", step_plain, plain=True),
    Case("step-async", "a step of two groups, async quorum", step_async),
    Case("step-sync", "a step of two groups, sync quorum", step_sync),
    Case("ddp-25mb", "a step of two groups with 25 MB of gradients, async quorum", step_25mb),
)
