"""How well and how cheaply groups learn that communicate rarely, beside data parallelism, with and without a fault.

    python examples/diloco/compare.py

Each row is a run of two groups on one machine, with the same model, the same text, and the same number of optimizer
steps a group. In a run with a fault group 1 gets SIGKILL when a third of it is done and is started again at once; a
machine that is so slow that the others' steps would be over before it is back lets them go on until it is. The program
ends with an error if a run fails or the groups of one do not end with the same state.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchft.coordination import LighthouseServer
from torchft.launch.processes import Child, Children, terminate_as_interrupt
from torchft.launch.watch import Watch
from torchft.runtime.deadline import Deadline

EXAMPLES = Path(__file__).resolve().parents[1]
DILOCO = EXAMPLES / "diloco" / "train_diloco.py"
GROUPS = 2
_NO_END = 10**9


@dataclass(frozen=True)
class Algorithm:
    """One way to train."""

    name: str
    script: Path
    env: dict[str, str]

    def commits(self, steps: int, sync_every: int) -> int:
        """Steps of the Manager in a run."""
        windows = steps // sync_every * int(self.env.get("FRAGMENTS", "1"))
        return steps if self.script.name == "train_data_parallel.py" else windows

    def steps(self, commits: int, sync_every: int) -> int:
        """Steps of the optimizer in which there are so many commits; a multiple of ``sync_every``."""
        steps = 0
        while self.commits(steps, sync_every) < commits:
            steps += sync_every
        return steps


ALGORITHMS = {
    "data-parallel": Algorithm("data parallel", EXAMPLES / "diloco" / "train_data_parallel.py", {}),
    "localsgd": Algorithm("Local SGD", EXAMPLES / "localsgd" / "train_localsgd.py", {}),
    "diloco": Algorithm("DiLoCo", DILOCO, {}),
    "diloco-quantized": Algorithm("DiLoCo, one byte an element", DILOCO, {"QUANTIZE": "1"}),
    "streaming": Algorithm("Streaming DiLoCo, 4 fragments", DILOCO, {"FRAGMENTS": "4", "FRAGMENT_SYNC_DELAY": "2"}),
}


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    bits: float
    megabytes: float
    """Handed to the all-reduce by the group that trained longest, before any quantization."""
    seconds: float
    alone: int
    """Commits of group 0 without the other."""
    steps: int
    """Of the optimizer, that were to be taken; more than asked for where group 1 took long to come back."""
    identical: bool


def run(algorithm: Algorithm, options: argparse.Namespace, fault: bool, folder: Path) -> Result:
    """One run.

    Raises:
        RuntimeError: a group failed, or took too long.
    """
    folder.mkdir()
    deadline = Deadline(options.patience)
    lighthouse = LighthouseServer("127.0.0.1:0", min_replicas=1, join_timeout_ms=5000)
    env = {
        "NUM_REPLICA_GROUPS": str(GROUPS),
        "TORCHFT_LIGHTHOUSE": lighthouse.address(),
        "TOTAL_STEPS": f"@{folder / 'total'}",
        "MIN_STEP_SEC": str(options.step_sec),
        "SYNC_EVERY": str(options.sync_every),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **algorithm.env,
    }

    def set_total(steps: int) -> None:
        (folder / "total.new").write_text(str(steps))
        (folder / "total.new").replace(folder / "total")

    def until(child: Child, watch: Watch, happened: Callable[[], bool]) -> None:
        while not happened():
            _check(child, deadline, running=True)
            child.wait(0.05)
            watch.look()

    steps: int = options.steps
    set_total(steps if not fault else _NO_END)

    def start(group: int, life: int) -> tuple[Child, Path]:
        metrics = folder / f"group{group}.{life}.jsonl"
        child = children.start(
            f"group {group}",
            [sys.executable, str(algorithm.script)],
            {**env, "REPLICA_GROUP_ID": str(group), "METRICS_FILE": str(metrics)},
            folder / f"group{group}.{life}.log",
        )
        return child, metrics

    try:
        with Children() as children:
            began = time.monotonic()
            (zero, zero_metrics), (one, one_metrics) = start(0, 0), start(1, 0)
            if fault:
                first = Watch(one_metrics)
                third = algorithm.commits(options.steps, options.sync_every) // 3
                until(one, first, lambda: first.step >= third)
                one.kill()
                one, one_metrics = start(1, 1)
                # Group 0 must not have ended when it is back, however slow this machine is.
                second = Watch(one_metrics)
                until(one, second, lambda: any(commit.participants == GROUPS for commit in second.commits))
                steps = max(steps, algorithm.steps(second.step, options.sync_every) + 2 * options.sync_every)
                set_total(steps)
            for child in (zero, one):
                child.wait(deadline.remaining())
                _check(child, deadline, running=False)
            seconds = time.monotonic() - began
    finally:
        lighthouse.shutdown()
    ends = [_end(metrics) for metrics in (zero_metrics, one_metrics)]
    watch = Watch(zero_metrics)
    watch.look()
    return Result(
        bits=float(ends[0]["bits"]),
        megabytes=max(float(end["bytes"]) for end in ends) / 1e6,
        seconds=seconds,
        alone=sum(commit.participants < GROUPS for commit in watch.commits),
        identical=ends[0]["state"] == ends[1]["state"],
        steps=steps,
    )


def _check(child: Child, deadline: Deadline, running: bool) -> None:
    code = child.exit_code()
    if (code is None and not deadline.expired) if running else code == 0:
        return
    said = "\n".join(child.last_lines(30))
    what = "is not done" if code is None else f"ended with {code}"
    raise RuntimeError(f"{child.name} {what}. The end of {child.log}:\n{said}")


def _end(metrics: Path) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(metrics.read_text().splitlines()[-1])
    if last["event"] != "end":
        raise RuntimeError(f"{metrics} does not say how it ended: {last}")
    return last


def table(results: dict[tuple[str, bool], Result]) -> Table:
    """What is printed at the end."""
    out = Table(title="two groups, equal numbers of optimizer steps")
    for column in ("", "fault", "bits a character", "MB sent", "less by", "s", "alone", "equal"):
        out.add_column(column, justify="left" if column in ("", "fault") else "right", no_wrap=True)
    yardstick = next((r for (key, _), r in results.items() if key == "data-parallel"), None)
    for (key, fault), r in results.items():
        # Quantized, an element is a byte and not four.
        sent = r.megabytes / 4 if key == "diloco-quantized" else r.megabytes
        out.add_row(
            ALGORITHMS[key].name,
            "SIGKILL" if fault else "none",
            f"{r.bits:.3f}",
            f"{sent:.1f}",
            "" if yardstick is None else f"{yardstick.megabytes / sent:.0f}x",
            f"{r.seconds:.0f}",
            str(r.alone),
            "yes" if r.identical else "NO",
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="of the optimizer, a group (800)")
    parser.add_argument("--step-sec", type=float, default=0.03, help="least seconds of a step (0.03)")
    parser.add_argument("--sync-every", type=int, default=20, help="optimizer steps a window (20)")
    parser.add_argument("--only", nargs="+", choices=[*ALGORITHMS], default=[*ALGORITHMS], metavar="ALGORITHM")
    parser.add_argument("--patience", type=float, default=300, help="most seconds of one run (300)")
    parser.add_argument("--logs", type=Path, help="where the groups' logs are kept; thrown away by default")
    options = parser.parse_args()
    console = Console()
    results: dict[tuple[str, bool], Result] = {}
    with tempfile.TemporaryDirectory() as thrown_away, terminate_as_interrupt():
        logs = options.logs or Path(thrown_away)
        logs.mkdir(parents=True, exist_ok=True)
        for key in options.only:
            for fault in (False, True):
                console.print(f"{ALGORITHMS[key].name}{', a fault' if fault else ''} …")
                folder = logs / f"{key}{'-fault' if fault else ''}"
                results[key, fault] = run(ALGORITHMS[key], options, fault, folder)
    Console(width=max(100, console.width)).print(table(results))  # whole, also in a file
    return 0 if all(r.identical for r in results.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as e:
        sys.exit(f"compare: {e}")
