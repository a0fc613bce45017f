"""``torchft demo``: two replica groups train, one joins late, is killed, comes back; nothing is lost.

The demo runs examples/live_checkpoint_recovery/train_ddp_lcr.py as a user would, each group under its own
torchrun, with a lighthouse inside this process. What happened is read from what the groups report, never
assumed: the closing checks are computed from it, and any that fails makes the exit code 1.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchft.coordination.lighthouse_server import LighthouseServer
from torchft.launch.processes import Children, terminate_as_interrupt
from torchft.launch.stage import CHECKOUT, Life, Plan, Stage, StageFailed

__all__ = ["Check", "demo", "judge", "play"]

_SCRIPT = CHECKOUT / "examples" / "live_checkpoint_recovery" / "train_ddp_lcr.py"
_TOGETHER = 60
"""Steps the groups commit together before the kill."""
_ENOUGH = 0.95
_ENOUGH_STEPS = 300
"""Steps after which the accuracy is sure to be there."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold at the end."""

    what: str
    holds: bool
    detail: str


def play(stage: Stage) -> tuple[list[Life], float]:
    """The story. Returns the lives of the groups and the seconds from the kill to the survivor's next commit.

    Raises:
        StageFailed: as of :meth:`Stage.until`.
    """
    plan = stage.plan
    one = stage.start(1)
    stage.until("group 1 commits its first step", lambda: bool(one.watch.commits))
    stage.tell("group 1 trains [bold]alone[/bold]; group 0 is started only now")
    zero = stage.start(0)

    stage.until("group 0 has joined", lambda: bool(zero.watch.heals))
    stage.tell(f"group 0 [bold]joins late[/bold], at step {zero.watch.heals[0].step}: {_healed(zero)} from group 1")
    stage.until("both train together", lambda: _together(zero) >= _TOGETHER)
    stage.tell(f"both train together; group 1 is at step {one.watch.step}")

    stage.kill(zero)
    assert zero.killed is not None
    killed = zero.killed
    at = one.watch.step
    stage.tell(f"[bold red]SIGKILL[/bold red] to all processes of group 0, after step {at}")
    again = stage.start(0)  # at once, as a supervisor would

    def next_commit() -> float | None:
        times = (c.time for c in one.watch.commits if c.time > killed and c.participants == 1)
        return next(times, None)

    stage.until("group 1 commits a step without group 0", lambda: next_commit() is not None)
    gap = (next_commit() or killed) - killed
    stage.tell(f"group 1 goes on: its next commit came [bold]{gap:.2f} s[/bold] after the kill")

    stage.until("group 0 is back", lambda: bool(again.watch.heals))
    back = again.watch.heals[0]
    stage.tell(
        f"group 0 was [bold]restarted[/bold] and is back at step {back.step}, {back.time - killed:.1f} s after the "
        f"kill: {_healed(again)} from group 1"
    )
    stage.set_total(max(back.step + plan.steps, _ENOUGH_STEPS))
    stage.tell(f"both train together to step {stage.total}")
    lives = [one, again]
    stage.until(f"both end at step {stage.total}", lambda: all(x.watch.end and x.child.exit_code() == 0 for x in lives))
    stage.tell("both groups have ended")
    return stage.lives, gap


def judge(total: int, lives: list[Life]) -> list[Check]:
    """What must hold at the end, computed from what the groups reported.

    Args:
        total: the step at which the groups were to end.
        lives: all lives of both groups.
    """
    ends = {life.group: life.watch.end for life in lives if life.killed is None}
    one, zero = ends.get(1), ends.get(0)
    survivor = [c.step for life in lives if life.group == 1 for c in life.watch.commits]
    heals = [heal for life in lives for heal in life.watch.heals if heal.step > 0]
    rejoined = [life for life in lives if life.group == 0 and _together(life)]
    both = [end for end in (zero, one) if end is not None]
    return [
        Check(
            "steps committed",
            len(both) == 2 and {end.step for end in both} == {total},
            " and ".join(f"{end.step}" for end in both) or "none",
        ),
        Check(
            "the survivor lost no step",
            survivor == list(range(1, total + 1)),
            f"group 1 committed {len(set(survivor))} of {total} steps, in order, without a restart"
            if survivor == sorted(set(survivor))
            else "group 1 committed steps out of order",
        ),
        Check(
            "recoveries",
            len(heals) >= 2 and len(rejoined) >= 2,
            f"{len(heals)} heals; group 0 took part again after {len(rejoined)} of 2",
        ),
        Check(
            "states identical",
            len(both) == 2 and len({end.state for end in both}) == 1,
            "yes" if len(both) == 2 and len({end.state for end in both}) == 1 else "no",
        ),
        Check(
            "accuracy on held-out digits",
            len(both) == 2 and min(end.accuracy for end in both) > _ENOUGH,
            " and ".join(f"{100 * end.accuracy:.2f} %" for end in both)
            + f" (more than {100 * _ENOUGH:.0f} % is asked)",
        ),
    ]


def _together(life: Life) -> int:
    return sum(commit.participants == 2 for commit in life.watch.commits)


def _healed(life: Life) -> str:
    done = life.transfers()
    if done:
        return f"healed {done[0]}"
    return f"healed {life.watch.heals[0].bytes / 1e6:.1f} MB"


def _summary(console: Console, total: int, lives: list[Life], gap: float, seconds: float) -> list[Check]:
    checks = judge(total, lives)
    table = Table(title="torchft demo", title_justify="left", show_header=False)
    for check in checks:
        mark = "[green]ok[/green]" if check.holds else "[bold red]FAILED[/bold red]"
        table.add_row(mark, check.what, check.detail)
    table.add_section()
    for life in lives:
        for transfer in life.transfers():
            table.add_row("", f"state to {life.child.name}", str(transfer))
    table.add_row("", "kill to next commit", f"{gap:.2f} s")
    table.add_row("", "the whole demo", f"{seconds:.0f} s")
    console.print(table, highlight=False)
    return checks


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--steps", type=click.IntRange(10), default=300, help="Steps to train after the restart.")
@click.option("--step-sec", type=click.FloatRange(0), default=0.05, help="Least seconds a step takes.")
@click.option("--state-mb", type=click.FloatRange(0), default=50.0, help="MB of frozen weights added to the model.")
@click.option("--transport", type=click.Choice(["pg", "http"]), default="pg", help="What carries the state.")
@click.option("--keep-logs", type=click.Path(file_okay=False, path_type=Path), help="Keep logs and events there.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result there.")
@click.option("--quiet", "-q", is_flag=True, help="Only the closing summary.")
@click.option("--script", type=click.Path(path_type=Path), default=_SCRIPT, hidden=True)
@click.pass_context
def demo(
    ctx: click.Context,
    steps: int,
    step_sec: float,
    state_mb: float,
    transport: str,
    keep_logs: Path | None,
    json_file: Path | None,
    quiet: bool,
    script: Path,
) -> None:
    """Watch two replica groups train on handwritten digits, join late, die and recover.

    Takes about a minute on two cores and needs no GPU. The exit code is 0 only if everything went as told.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise click.ClickException("the demo's data come with scikit-learn: pip install 'torchft[examples]'")
    if not script.is_file():
        raise click.ClickException(
            f"the demo runs an example of the source checkout, {script}, which is not there: run `make demo` in one"
        )
    if json_file is not None and not os.access(json_file.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{json_file} cannot be written: is its folder there?", param_hint="--json")
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 110
    logs = keep_logs or Path(tempfile.mkdtemp(prefix="torchft-demo-"))
    logs.mkdir(parents=True, exist_ok=True)
    for old in (*logs.glob("group*-life*.log"), *logs.glob("group*-life*.jsonl")):
        old.unlink()
    plan = Plan(steps, step_sec, state_mb, transport, script.resolve(), logs)
    code = 128 + signal.SIGINT
    try:
        code = _run(plan, console, quiet, json_file)
    except KeyboardInterrupt:
        console.print("interrupted: all groups are ended")
    if keep_logs is None and code == 0:
        shutil.rmtree(logs)
    else:
        console.print(f"the logs are in {escape(str(logs))}", highlight=False)
    ctx.exit(code)


def _run(plan: Plan, console: Console, quiet: bool, json_file: Path | None) -> int:
    """The demo without its options. Returns the exit code."""
    with contextlib.ExitStack() as owned:
        owned.enter_context(_logged(plan.logs / "lighthouse.log"))
        lighthouse = LighthouseServer("127.0.0.1:0", min_replicas=1)
        owned.callback(lighthouse.shutdown)
        with terminate_as_interrupt(), Children() as children:
            stage = Stage(plan, children, lighthouse.address(), console, quiet)
            stage.tell(f"lighthouse at {lighthouse.address()}; group 1 starts (torchrun, torch: some seconds)")
            try:
                with stage.shown():
                    lives, gap = play(stage)
            except StageFailed as e:
                console.print(f"[bold red]FAILED[/bold red]: {escape(str(e))}", highlight=False)
                _write(json_file, {"ok": False, "error": str(e)})
                return 1
            checks = _summary(console, stage.total, lives, gap, stage.seconds())
    ok = all(check.holds for check in checks)
    _write(
        json_file,
        {
            "ok": ok,
            "checks": [asdict(check) for check in checks],
            "transfers": [asdict(transfer) for life in lives for transfer in life.transfers()],
            "kill_to_next_commit_sec": gap,
            "accuracy": [life.watch.end.accuracy for life in lives if life.watch.end],
            "seconds": stage.seconds(),
        },
    )
    return 0 if ok else 1


def _write(file: Path | None, result: dict[str, object]) -> None:
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What torchft logs in this process goes to the file, not to the spectator."""
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(name)s - %(message)s"))
    package = logging.getLogger("torchft")
    former = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = former
        handler.close()
