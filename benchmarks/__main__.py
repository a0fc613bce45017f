"""Runs the benchmarks with both implementations in turn and prints how they compare.

python -m benchmarks --only step --repeat 3 --json out.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, Case, Figures, Run, larger_is_better
from benchmarks.processes import IMPLEMENTATIONS, OURS, PEER, ROOT, ChildError

__all__ = ["main"]

Results = dict[str, dict[str, list[Figures]]]
"""Case, implementation, one entry a run."""


def measure(
    cases: list[Case], names: list[str], repeat: int, full: bool, quick: bool, log: Console
) -> tuple[Results, list[str]]:
    """Runs every case ``repeat`` times with each implementation, A B A B …; a run that fails is told and left out.

    A case's own bound on its runs holds unless ``full``.
    """
    results: Results = defaultdict(lambda: defaultdict(list))
    failures: list[str] = []
    for case in cases:
        for index in range(repeat):
            for name in ["plain"] if case.plain else names:
                if index >= case.runs(name, repeat) and (not full or case.only_ours):
                    continue
                impl = OURS if name == "plain" and OURS.name in names else IMPLEMENTATIONS.get(name, PEER)
                start = time.monotonic()
                try:
                    figures = case.measure(Run(impl, index, quick))
                except (ChildError, RuntimeError) as e:
                    failures.append(f"{case.name}, {name}, run {index}: {e}")
                    log.print(
                        f"[red]{case.name} {name} {index}: failed: {str(e).partition(chr(10))[0]}[/]", highlight=False
                    )
                    continue
                results[case.name][name].append(figures)
                late = [k for k, v in figures.items() if v is None]
                if late:
                    failures.append(
                        f"{case.name}, {name}, run {index}: not within {case.patience:g} s: {'; '.join(late)}"
                    )
                took = time.monotonic() - start
                shown = "  ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in figures.items())
                log.print(f"[dim]{case.name} {name} {index} ({took:.0f} s): {shown}[/]", highlight=False)
    return results, failures


def known(runs: list[Figures], figure: str) -> list[float]:
    """The values of that figure in the runs that have one."""
    return [v for f in runs if (v := f.get(figure)) is not None]


def spread(values: list[float], repeat: int) -> str:
    """The median with the smallest and the largest value, and of how many runs where that is not ``repeat``."""
    few = "" if len(values) == repeat else f" [{len(values)} run{'s' * (len(values) > 1)}]"
    if len(values) == 1:
        return f"{values[0]:.3f}{few}"
    return f"{statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f}){few}"


def cell(case: Case, name: str, runs: list[Figures], figure: str, repeat: int) -> str:
    """What the table says of one figure of the implementation of that name."""
    if case.runs(name, repeat) == 0:
        return "not run"
    values = known(runs, figure)
    if values:
        return spread(values, repeat)
    if not runs and case.only_ours:
        return "has none"
    if any(figure in f for f in runs):
        return f"not within {case.patience:g} s"
    return "has none" if runs else "failed"


def ratio(figure: str, runs: list[list[Figures]]) -> str:
    """The medians' ratio, marked where more is better; nothing where there is none."""
    a, b = (statistics.median(known(r, figure) or [0.0]) for r in runs)
    if not a or b <= 0:
        return ""
    return f"{a / b:.2f}{' (more is better)' if larger_is_better(figure) else ''}"


def table(cases: list[Case], results: Results, names: list[str], repeat: int) -> Table:
    out = Table(title="median (smallest … largest)", title_justify="left")
    out.add_column("case")
    out.add_column("figure")
    out.add_column("target")
    for name in names:
        out.add_column(name, justify="right")
    if len(names) == 2:
        out.add_column(f"{names[0]} / {names[1]}", justify="right")
    plain = known(results.get("step-plain", {}).get("plain", []), "step mean, ms")
    for case in cases:
        found = results.get(case.name, {})
        if case.plain:
            for figure in dict.fromkeys(k for f in found.get("plain", []) for k in f):
                out.add_row(case.name, figure, "", spread(known(found["plain"], figure), repeat))
            continue
        runs = {n: list(found.get(n, [])) for n in names}
        if plain and case.name.startswith("step-"):
            base = statistics.median(plain)
            for rows in runs.values():
                rows[:] = [{"over plain DDP, ms": (f["step mean, ms"] or 0.0) - base, **f} for f in rows]
        for i, figure in enumerate(dict.fromkeys(k for n in names for f in runs[n] for k in f)):
            cells = [cell(case, n, runs[n], figure, repeat) for n in names]
            if len(names) == 2:
                cells.append(ratio(figure, [runs[n] for n in names]))
            out.add_row(case.name if i == 0 else "", figure, case.target if i == 0 else "", *cells)
        out.add_section()
    return out


@click.command()
@click.option("--only", multiple=True, help="Only the case of this name, or all that start with it; may be repeated.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs of each case.")
@click.option("--full", is_flag=True, help="As many runs of the long cases too, which have a bound of their own.")
@click.option("--impl", "names", multiple=True, type=click.Choice(list(IMPLEMENTATIONS)), help="Only this one.")
@click.option("--quick", is_flag=True, help="Few steps and small states: to see that it works, not for figures.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write every run here.")
@click.option("--list", "listing", is_flag=True, help="Name the cases and end.")
def main(
    only: tuple[str, ...],
    repeat: int,
    full: bool,
    names: tuple[str, ...],
    quick: bool,
    out: Path | None,
    listing: bool,
) -> None:
    """Measures torchft beside the peer that `make peer` installs."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if listing:
        for case in CASES:
            console.print(f"{case.name:18} {case.about}", highlight=False)
        return
    exact = {c.name for c in CASES} & set(only)
    starts = tuple(o for o in only if o not in exact)
    chosen = [c for c in CASES if not only or c.name in exact or (starts and c.name.startswith(starts))]
    if not chosen:
        raise click.BadParameter(f"no case starts with {', '.join(only)}; see --list", param_hint="--only")
    impls = list(dict.fromkeys(names)) or list(IMPLEMENTATIONS)
    if PEER.name in impls and not (PEER.path / "torchft").is_dir():
        raise click.ClickException(f"{PEER.path.relative_to(ROOT)} is missing: run `make peer`, or use --impl ours")
    results, failures = measure(chosen, impls, repeat, full, quick, Console(stderr=True, width=200))
    console.print(table(chosen, results, impls, repeat))
    for failure in failures:
        console.print(failure, style="red", highlight=False, markup=False)
    if out is not None:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        record = {
            "machine": machine,
            "quick": quick,
            "full": full,
            "repeat": repeat,
            "results": results,
            "failures": failures,
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
    if any(f", {OURS.name}, " in f for f in failures):
        sys.exit(1)


if __name__ == "__main__":
    main()
