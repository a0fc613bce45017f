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

from benchmarks.cases import CASES, Case, Figures, Run
from benchmarks.processes import IMPLEMENTATIONS, OURS, PEER, ROOT, ChildError

__all__ = ["main"]

Results = dict[str, dict[str, list[Figures]]]
"""Case, implementation, one entry a run."""


def measure(cases: list[Case], names: list[str], repeat: int, quick: bool, log: Console) -> tuple[Results, list[str]]:
    """Runs every case ``repeat`` times with each implementation, A B A B …; a run that fails is told and left out."""
    results: Results = defaultdict(lambda: defaultdict(list))
    failures: list[str] = []
    for case in cases:
        for index in range(repeat):
            for name in ["plain"] if case.plain else names:
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
                took = time.monotonic() - start
                shown = "  ".join(f"{k} {v:.3f}" for k, v in figures.items())
                log.print(f"[dim]{case.name} {name} {index} ({took:.0f} s): {shown}[/]", highlight=False)
    return results, failures


def spread(values: list[float]) -> str:
    """The median with the smallest and the largest value."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f})"


def table(cases: list[Case], results: Results, names: list[str]) -> Table:
    out = Table(title="median (smallest … largest)", title_justify="left")
    out.add_column("case")
    out.add_column("figure")
    for name in names:
        out.add_column(name, justify="right")
    if len(names) == 2:
        out.add_column(f"{names[0]} / {names[1]}", justify="right")
    plain = [f["step mean, ms"] for f in results.get("step-plain", {}).get("plain", [])]
    for case in cases:
        found = results.get(case.name, {})
        if case.plain:
            for figure in dict.fromkeys(k for f in found.get("plain", []) for k in f):
                out.add_row(case.name, figure, spread([f[figure] for f in found["plain"]]))
            continue
        rows = {
            figure: {n: [f[figure] for f in found.get(n, []) if figure in f] for n in names}
            for figure in dict.fromkeys(k for n in names for f in found.get(n, []) for k in f)
        }
        if plain and case.name.startswith("step-"):
            base = statistics.median(plain)
            over = {n: [v - base for v in values] for n, values in rows.get("step mean, ms", {}).items()}
            rows = {"over plain DDP, ms": over} | rows
        for i, (figure, by_name) in enumerate(rows.items()):
            cells = [spread(by_name[n]) if by_name[n] else "failed" for n in names]
            if len(names) == 2:
                a, b = (statistics.median(by_name[n]) if by_name[n] else 0.0 for n in names)
                cells.append(f"{a / b:.2f}" if a and b > 0 else "")
            out.add_row(case.name if i == 0 else "", figure, *cells)
        out.add_section()
    return out


@click.command()
@click.option("--only", multiple=True, help="Only cases whose name starts with this; may be repeated.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs of each case.")
@click.option("--impl", "names", multiple=True, type=click.Choice(list(IMPLEMENTATIONS)), help="Only this one.")
@click.option("--quick", is_flag=True, help="Few steps and small states: to see that it works, not for figures.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Also write every run here.")
@click.option("--list", "listing", is_flag=True, help="Name the cases and end.")
def main(
    only: tuple[str, ...], repeat: int, names: tuple[str, ...], quick: bool, out: Path | None, listing: bool
) -> None:
    """Measures torchft beside the peer that `make peer` installs."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if listing:
        for case in CASES:
            console.print(f"{case.name:18} {case.about}", highlight=False)
        return
    chosen = [c for c in CASES if not only or c.name.startswith(only)]
    if not chosen:
        raise click.BadParameter(f"no case starts with {', '.join(only)}; see --list", param_hint="--only")
    impls = list(dict.fromkeys(names)) or list(IMPLEMENTATIONS)
    if PEER.name in impls and not (PEER.path / "torchft").is_dir():
        raise click.ClickException(f"{PEER.path.relative_to(ROOT)} is missing: run `make peer`, or use --impl ours")
    results, failures = measure(chosen, impls, repeat, quick, Console(stderr=True, width=200))
    console.print(table(chosen, results, impls))
    for failure in failures:
        console.print(failure, style="red", highlight=False, markup=False)
    if out is not None:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        record = {"machine": machine, "quick": quick, "repeat": repeat, "results": results, "failures": failures}
        out.write_text(json.dumps(record, indent=1) + "\n")
    if any(f", {OURS.name}, " in f for f in failures):
        sys.exit(1)


if __name__ == "__main__":
    main()
