"""The examples as their README runs them: real groups under torchrun, a real lighthouse, real data."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.examples.forks import Forks
from torchft.coordination.lighthouse_server import LighthouseServer
from torchft.launch.processes import Child, Children
from torchft.launch.watch import Watch, transfers
from torchft.runtime.deadline import Deadline
from torchft.testing.ports import ReservedPort

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
_ports: list[ReservedPort] = []
LCR = ROOT / "examples" / "live_checkpoint_recovery" / "train_ddp_lcr.py"


@pytest.fixture
def lighthouse() -> Iterator[str]:
    server = LighthouseServer("127.0.0.1:0", min_replicas=1)
    yield server.address()
    server.shutdown()


@dataclass
class Group:
    child: Child
    watch: Watch

    def until(self, happened: Callable[[Watch], bool]) -> None:
        deadline = Deadline(200)
        while not happened(self.watch):
            assert self.child.exit_code() is None, "\n".join(self.child.last_lines(60))
            assert not deadline.expired, "\n".join(self.child.last_lines(60))
            self.child.wait(0.1)
            self.watch.look()

    def finish(self) -> None:
        assert self.child.wait(200) == 0, "\n".join(self.child.last_lines(60))
        self.watch.look()


class Total:
    """The step at which the groups end, set when what a test waits for has happened: no timing is guessed."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "total"
        self._file.write_text("1000000")
        self.text = f"@{self._file}"

    def set(self, steps: int) -> int:
        """Sets it, with enough steps for the accuracy. Returns what was set."""
        steps = max(steps, 300)
        new = self._file.with_suffix(".new")
        new.write_text(str(steps))
        new.replace(self._file)
        return steps


def start(children: Children, folder: Path, lighthouse: str, group: int, argv: list[str], **env: str) -> Group:
    watch = Watch(folder / f"group{group}.jsonl")
    child = children.start(
        f"group {group}",
        argv,
        {
            "REPLICA_GROUP_ID": str(group),
            "NUM_REPLICA_GROUPS": "2",
            "TORCHFT_PROACTIVE_RECOVERY": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHFT_LIGHTHOUSE": lighthouse,
            "QUICK_RUN": "1",
            "METRICS_FILE": str(watch.path),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **env,
        },
        folder / f"group{group}.log",
    )
    return Group(child, watch)


def torchrun(script: Path) -> list[str]:
    """As in the README, on a port that is free: as long as this process runs, since two of them take a few."""
    reserved = ReservedPort()
    _ports.append(reserved)
    return [TORCHRUN, f"--master_port={reserved.port}", "--nnodes=1", "--nproc_per_node=1", "--", str(script)]


def check_ends(groups: list[Group], steps: int) -> None:
    ends = [group.watch.end for group in groups]
    assert all(end is not None and end.step == steps and end.accuracy > 0.95 for end in ends), ends
    assert len({end.state for end in ends if end is not None}) == 1, ends


def test_one_group_alone_ends_over_95_percent(tmp_path: Path, lighthouse: str) -> None:
    with Children() as children:
        group = start(children, tmp_path, lighthouse, 0, torchrun(ROOT / "train_ddp.py"), MIN_STEP_SEC="0")
        group.finish()
    check_ends([group], 250)
    assert [commit.step for commit in group.watch.commits] == list(range(1, 251))
    assert all(commit.participants == 1 for commit in group.watch.commits)


def test_two_groups_without_faults_end_alike_and_over_95_percent(tmp_path: Path, lighthouse: str) -> None:
    argv = [sys.executable, str(ROOT / "train_ddp.py")]  # one rank needs no torchrun
    total = Total(tmp_path)
    with Forks() as children:
        groups = [start(children, tmp_path, lighthouse, group, argv, TOTAL_STEPS=total.text) for group in (0, 1)]
        groups[0].until(lambda watch: any(commit.participants == 2 for commit in watch.commits))
        steps = total.set(groups[0].watch.step + 100)
        for group in groups:
            group.finish()
    check_ends(groups, steps)


def test_the_late_joiner_takes_the_state_of_the_running_group(tmp_path: Path, lighthouse: str) -> None:
    total = Total(tmp_path)
    with Forks() as children:
        one = start(
            children, tmp_path, lighthouse, 1, [sys.executable, str(LCR)], TOTAL_STEPS=total.text, STATE_MB="20"
        )
        one.until(lambda watch: bool(watch.commits))
        zero = start(children, tmp_path, lighthouse, 0, torchrun(LCR), TOTAL_STEPS=total.text, STATE_MB="20")
        zero.until(lambda watch: bool(watch.heals))
        heal = zero.watch.heals[0]
        steps = total.set(heal.step + 100)
        for group in (zero, one):
            group.finish()
    check_ends([zero, one], steps)
    assert [commit.step for commit in one.watch.commits] == list(range(1, steps + 1))
    assert one.watch.heals == []
    assert heal.step > 0
    assert heal.bytes > 20e6
    # One step in which it healed and took no part, then both together to the end.
    assert [c.step for c in zero.watch.commits if c.participants == 2] == list(range(heal.step + 2, steps + 1))
    with open(zero.child.log) as log:
        received = transfers(log)
    assert len(received) == 1, "the transport's log line was not understood"
    assert received[0].bytes >= heal.bytes
    check_readme([zero, one])


# train_ddp.py, in a process whose vote on the last step is no, once.
MISSES_THE_LAST_COMMIT = """
import os, runpy, sys
from pathlib import Path
from torchft.manager import Manager

vote, missed = Manager.should_commit, []

def should_commit(self, timeout=None):
    last = int(Path(os.environ["TOTAL_STEPS"][1:]).read_text()) - 1
    if self.current_step() == last and not missed:
        missed.append(last)
        self._works.wait(self._timeout, self._pg.abort, self._pg.errored)
        self.report_error(RuntimeError("injected into the last step"))
    return vote(self, timeout)

Manager.should_commit = should_commit
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_a_group_that_misses_the_last_commit_ends_with_the_same_state(tmp_path: Path, lighthouse: str) -> None:
    total = Total(tmp_path)
    script = str(ROOT / "train_ddp.py")
    with Forks() as children:
        one = start(children, tmp_path, lighthouse, 1, [sys.executable, script], TOTAL_STEPS=total.text)
        sabotaged = [sys.executable, "-c", MISSES_THE_LAST_COMMIT, script]
        zero = start(children, tmp_path, lighthouse, 0, sabotaged, TOTAL_STEPS=total.text)
        zero.until(lambda watch: any(commit.participants == 2 for commit in watch.commits))
        steps = total.set(zero.watch.step + 100)
        for group in (zero, one):
            group.finish()
    assert zero.watch.failed_steps == 1
    assert "injected into the last step" in zero.child.log.read_text()
    check_ends([zero, one], steps)


def check_readme(groups: list[Group]) -> None:
    """The README explains lines that are really logged."""
    readme = (LCR.parent / "README.md").read_text()
    blocks = re.findall(r"```txt\n(.*?)```", readme, re.S)
    explained = shapes(line for block in blocks for line in block.splitlines())
    assert len(explained) >= 15
    logged = shapes(line for group in groups for line in group.child.log.read_text().splitlines())
    assert explained - logged == set()


def shapes(lines: Iterable[str]) -> set[str]:
    """Log lines without what differs from run to run: time, ids, addresses, numbers."""
    found = set()
    for text in lines:
        text = re.sub(r"^[\d-]+ [\d:,]+ (?=INFO)", "", text.strip())
        text = re.sub(r"http://[^\s'\",]+", "URL", text)
        text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}|\d+(\.\d+)*", "N", text)
        found.add(text)
    return found
