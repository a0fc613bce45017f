"""A stage on which training groups are started, watched, killed and started again, while somebody looks on.

:class:`Stage` knows how a group is run (torchrun, environment, files) and how to wait for something that groups
report; what is played on it is somebody else's (torchft/cli/demo.py). Every wait ends: what is waited for happens,
a group ends that should not, or the patience is over; the last two raise :class:`StageFailed` with the last lines
of the groups concerned.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

import torchft
from torchft.launch.processes import Child, Children
from torchft.launch.watch import Transfer, Watch, transfers
from torchft.runtime.deadline import Deadline

__all__ = ["CHECKOUT", "Life", "Plan", "Stage", "StageFailed"]

CHECKOUT = Path(torchft.__file__).resolve().parents[1]
"""Where torchft is imported from: the source checkout, or site-packages."""
_LOOK_EVERY = 0.05
_NO_END = 10**9


class StageFailed(Exception):
    """The story did not go on: a group ended, or something did not happen in time."""


@dataclass(frozen=True)
class Plan:
    """What is run."""

    steps: int
    """To train together after the restart. When that is over is known only then: a slow machine takes longer to
    restart a group, and the other must not have ended before."""
    step_sec: float
    state_mb: float
    transport: str
    script: Path
    logs: Path
    patience_sec: float = 90.0
    """Longest wait for one thing to happen."""


@dataclass
class Life:
    """One life of one group: from its start to its end or death."""

    group: int
    child: Child
    watch: Watch
    killed: float | None = None
    """Unix time of the SIGKILL."""

    def transfers(self) -> list[Transfer]:
        """The states it received."""
        with open(self.child.log, encoding="utf-8", errors="replace") as lines:
            return transfers(lines)


class Stage:
    """Where groups 0 and 1 are run: their lives, the clock, and what the spectator sees.

    Args:
        plan: what is run.
        children: owns the processes.
        lighthouse: its address.
        console: for what is told; live progress where it is a terminal.
        quiet: tell nothing.
    """

    def __init__(self, plan: Plan, children: Children, lighthouse: str, console: Console, quiet: bool) -> None:
        self.plan = plan
        self.lives: list[Life] = []
        self._children = children
        self._lighthouse = lighthouse
        self._console = console
        self._quiet = quiet
        self._began = time.monotonic()
        self._pause = threading.Event()
        self._told_step = 0
        self._total_file = plan.logs / "total_steps"
        self.set_total(_NO_END)
        self._progress = Progress(
            TextColumn("group {task.fields[group]}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}  {task.fields[note]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._bars: dict[int, TaskID] = {g: self._progress.add_task("", total=None, group=g, note="") for g in (0, 1)}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, progress is shown live, on a terminal."""
        with self._progress:
            yield

    def seconds(self) -> float:
        """Since the stage was set."""
        return time.monotonic() - self._began

    def set_total(self, steps: int) -> None:
        """Sets the step at which the groups end. It must be ahead of them."""
        self.total = steps
        new = self._total_file.with_suffix(".new")
        new.write_text(str(steps))
        new.replace(self._total_file)

    def tell(self, text: str) -> None:
        """A line for the spectator, with the time. ``text`` is rich markup."""
        if not self._quiet:
            self._console.print(f"[dim]{self.seconds():6.1f} s[/dim]  {text}", highlight=False)

    def start(self, group: int) -> Life:
        """Starts a group as a scheduler would: torchrun with everything new, its store included."""
        plan = self.plan
        number = 1 + sum(life.group == group for life in self.lives)
        name = f"group {group}" if number == 1 else f"group {group}, life {number}"
        stem = plan.logs / f"group{group}-life{number}"
        watch = Watch(stem.with_suffix(".jsonl"))
        # The demo restarts a killed group itself. torchrun's own restart would outlive the kill only if
        # torchrun did, but what is shown here is the loss of a machine, and that takes torchrun along.
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        argv += ["--nnodes=1", "--nproc_per_node=1", "--max-restarts=0", "--", str(plan.script)]
        env = {
            "TORCHFT_LIGHTHOUSE": self._lighthouse,
            "TORCHFT_PROACTIVE_RECOVERY": "1",
            "REPLICA_GROUP_ID": str(group),
            "NUM_REPLICA_GROUPS": "2",
            "DATASET": "digits",
            "TOTAL_STEPS": f"@{self._total_file}",
            "MIN_STEP_SEC": str(plan.step_sec),
            "STATE_MB": str(plan.state_mb),
            "TRANSPORT": plan.transport,
            "JOIN_DELAY_SEC": "0",  # the demo itself starts group 0 late
            "METRICS_FILE": str(watch.path),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
        }
        life = Life(group, self._children.start(name, argv, env, stem.with_suffix(".log")), watch)
        self.lives.append(life)
        return life

    def until(self, what: str, happened: Callable[[], bool]) -> None:
        """Waits until ``happened()``, while progress is shown.

        Raises:
            StageFailed: a group ended that should not have, or it took too long.
        """
        deadline = Deadline(self.plan.patience_sec)
        while True:
            ended = [life for life in self.lives if life.killed is None and life.child.exit_code() is not None]
            for life in self.lives:  # after the look at exit codes: all that an ended group said is read
                life.watch.look()
            self._show()
            if happened():
                return
            for life in ended:
                if life.watch.end is None or life.child.exit_code() != 0:
                    raise StageFailed(
                        f"{life.child.name} ended with exit code {life.child.exit_code()} while waiting until "
                        f"{what}\n{_quoted(life.child)}"
                    )
            if len(ended) and all(life.killed is not None or life in ended for life in self.lives):
                raise StageFailed(f"all groups have ended, waiting until {what}")
            if deadline.expired:
                running = [life.child for life in self.lives if life not in ended and life.killed is None]
                raise StageFailed(
                    f"waited {self.plan.patience_sec:g} s until {what}\n" + "\n".join(map(_quoted, running))
                )
            self._pause.wait(_LOOK_EVERY)

    def kill(self, life: Life) -> None:
        """SIGKILL to all its processes, as the loss of its machine."""
        life.killed = time.time()
        life.child.kill()

    def _show(self) -> None:
        for group, bar in self._bars.items():
            lives = [life for life in self.lives if life.group == group]
            if not lives:
                continue
            watch = lives[-1].watch
            last = watch.commits[-1] if watch.commits else None
            if lives[-1].killed is not None:
                note = "killed"
            elif watch.end is not None:
                note = f"done, accuracy {100 * watch.end.accuracy:.1f} %"
            elif last is None:
                note = "starts" if watch.started is None else "waits for its quorum"
            else:
                note = f"{last.participants} in the quorum, loss {last.loss:.3f}"
            self._progress.update(
                bar, completed=watch.step, total=None if self.total == _NO_END else self.total, note=note
            )
        newest = max((life.watch.step for life in self.lives), default=0)
        if not self._console.is_terminal and newest >= self._told_step + 100:
            self._told_step = newest - newest % 100
            self.tell(f"… step {newest}" + ("" if self.total == _NO_END else f" of {self.total}"))


def _quoted(child: Child) -> str:
    lines = child.last_lines(200)
    # What torchrun adds when its worker fails is long and says less than what the worker said before.
    own = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
    quoted = (lines[:own] or lines)[-20:]
    return "\n".join([f"the last lines of {child.name} ({child.log}):", *(f"  | {line}" for line in quoted)])
