"""``torchft simulate``: the control protocol under random schedules of faults, or under a given one.

Exit code 0: nothing was violated; 1: something was, and the smallest schedule found that shows it is printed as a text
that ``--replay`` runs again; 130: interrupted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchft.launch.processes import terminate_as_interrupt
from torchft.runtime.signals import EndSignals
from torchft.testing.simulation import STORIES, Result, Schedule, Summary, minimal, run, run_seeds

__all__ = ["simulate"]

_PR_SET_PDEATHSIG = 1
_CHUNK = 50
_GLANCE = 0.2
"""Seconds between two looks whether somebody interrupts."""
_LINES = 200
"""Of a trace, at most."""

_SEEN = (
    ("standing step", "steps without asking"),
    ("prepare", "a change of the members agreed on"),
    ("change dropped", "a planned change dropped"),
    ("adoption", "a standing quorum adopted by a fresh lighthouse"),
    ("takeover", "a quorum without any member of the last one"),
    ("fenced leader", "a deposed leader found out"),
    ("waits for its lease", "a commit that waited for the lease"),
    ("partial commit", "a step that only some committed"),
    ("heal", "a state taken from another group"),
    ("state lost", "a job whose state nobody held any more"),
    ("answered again", "a lost answer given again"),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seeds", type=click.IntRange(1), default=1000, help="How many schedules.")
@click.option("--start", type=click.IntRange(0), default=0, help="The first seed.")
@click.option(
    "--replicas",
    default="2-6",
    metavar="N|FEW-MANY",
    callback=lambda context, option, value: _range(value),
    help="Groups at the beginning.",
)
@click.option("--jobs", type=click.IntRange(1), default=1, help="Processes.")
@click.option(
    "--story",
    "stories",
    multiple=True,
    type=click.Choice(list(STORIES)),
    show_default=False,
    help="Only such faults; may be given several times.",
)
@click.option(
    "--replay",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Run the schedule in this file instead, and print its trace.",
)
@click.option(
    "--lines", type=click.IntRange(1), default=_LINES, help="Lines of a trace that are printed, the last ones."
)
def simulate(
    seeds: int,
    start: int,
    replicas: tuple[int, int],
    jobs: int,
    stories: tuple[str, ...],
    replay: Path | None,
    lines: int,
) -> None:
    """Runs the control protocol under a simulated network and clock (docs/simulation.md).

    Crashes, stops, partitions, lost, late and doubled messages at random times and at bad moments; the same seed gives
    the same run. Seven invariants are checked after each event.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        with terminate_as_interrupt():
            if replay:
                code = _replay(console, replay, lines)
            else:
                code = _search(console, seeds, start, replicas, jobs, stories, lines)
    except KeyboardInterrupt:
        console.print("interrupted")
        code = 130
    raise SystemExit(code)


def _range(text: str) -> tuple[int, int]:
    few, _, many = text.partition("-")
    try:
        bounds = int(few), int(many or few)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor two with a dash between") from None
    if not 1 <= bounds[0] <= bounds[1] <= 32:
        raise click.BadParameter(f"{text!r}: between 1 and 32, the smaller one first")
    return bounds


def _replay(console: Console, file: Path, lines: int) -> int:
    try:
        schedule = Schedule.parse(file.read_text())
    except (OSError, ValueError) as e:
        raise click.ClickException(f"{file}: {e}") from e
    result = run(schedule, trace=True)
    _show(console, result, lines)
    return 0 if result.ok else 1


def _show(console: Console, result: Result, lines: int) -> None:
    assert result.trace is not None
    console.print(escape(result.trace.text(lines)))
    verdict = f"[bold red]{escape(str(result.violation))}[/bold red]" if result.violation else "no invariant is broken"
    console.print(f"\n{verdict}; {result.commits} commits in {result.seconds:.1f} simulated seconds")


def _search(
    console: Console,
    seeds: int,
    start: int,
    replicas: tuple[int, int],
    jobs: int,
    stories: Sequence[str],
    lines: int,
) -> int:
    few, many = replicas
    groups = str(few) if few == many else f"{few} to {many}"
    console.print(f"seeds {start} to {start + seeds - 1}, {groups} groups, {', '.join(stories) or 'all'} faults")
    began = time.monotonic()
    total = Summary()
    interrupted = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("schedules", total=seeds)
        try:
            for part in _parts(range(start, start + seeds), replicas, stories, jobs):
                total.merge(part)
                progress.update(task, completed=total.runs, description=f"schedules, {len(total.failed)} failed")
        except KeyboardInterrupt:
            interrupted = True
    _summary(console, total, time.monotonic() - began)
    if total.failed:
        total.failed.sort(key=lambda result: result.schedule.seed)
        _explain(console, total.failed, lines)
        return 1
    if interrupted:
        console.print(f"interrupted after {total.runs} of {seeds} schedules")
        return 130
    return 0


def _parts(
    seeds: range, replicas: tuple[int, int], stories: Sequence[str], jobs: int
) -> Iterator[Summary]:  # fmt: skip
    """The summaries of parts of the work, as they are ready.

    An interrupt is noted, and raised between two parts: in the midst of a pool's own code it would leave its locks
    held, or a process that it does not know of, which is waited for without end then; and while Python finalizes an
    object it would not be raised at all.
    """
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    if jobs == 1:
        with EndSignals(_INTERRUPTS) as signals:
            for chunk in chunks:
                part = Summary()
                for seed in chunk:
                    part.merge(run_seeds(range(seed, seed + 1), replicas, stories))
                    if signals.wait(0):
                        raise KeyboardInterrupt
                yield part
        return
    left, waiting = iter(chunks), set[concurrent.futures.Future[Summary]]()
    with EndSignals(_INTERRUPTS) as signals:
        pool = concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),)
        )
        try:
            while True:
                with _interrupts_held_back():
                    for chunk in islice(left, 2 * jobs - len(waiting)):
                        waiting.add(pool.submit(run_seeds, chunk, replicas, stories))
                if not waiting:
                    return
                done, waiting = concurrent.futures.wait(
                    waiting, _GLANCE, return_when=concurrent.futures.FIRST_COMPLETED
                )
                if signals.wait(0):
                    raise KeyboardInterrupt
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """They come after it; processes started in it begin with both held back, and are not ended by them half begun."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(parent: int) -> None:
    """A worker leaves Ctrl-C to the main process, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
    with contextlib.suppress(OSError, AttributeError):  # there is no prctl but on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _summary(console: Console, total: Summary, seconds: float) -> None:
    table = Table(title=f"{total.runs} schedules", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{total.seconds:,.0f}", "simulated seconds")
    table.add_row(f"{total.commits:,}", "commits")
    table.add_row(f"{total.events:,}", f"events, {total.events / max(seconds, 1e-9):,.0f} a second")
    for name, what in _SEEN:
        table.add_row(f"{total.saw[name]:,}", f"schedules saw {what}")
    table.add_row(
        f"{len(total.failed):,}", "[bold red]violated an invariant[/bold red]" if total.failed else "violations"
    )
    console.print(table)


def _explain(console: Console, failed: Sequence[Result], lines: int) -> None:
    for result in failed[:10]:
        console.print(f"seed {result.schedule.seed}: [red]{escape(str(result.violation))}[/red]")
    if len(failed) > 10:
        console.print(f"… and {len(failed) - 10} more")
    console.print(f"\nseed {failed[0].schedule.seed} made as small as it gets, ", end="")
    console.print("to be run again with torchft simulate --replay FILE:\n")
    smallest = minimal(failed[0])
    console.print(escape(smallest.schedule.text()))
    _show(console, smallest, lines)
