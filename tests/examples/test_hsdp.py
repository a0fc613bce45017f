"""The HSDP example: two groups of two ranks, one of which runs as its README says, under torchrun, and loses a rank."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.examples.forks import Forks
from torchft.coordination.lighthouse_server import LighthouseServer
from torchft.launch.processes import Child
from torchft.launch.watch import Watch
from torchft.runtime.deadline import Deadline
from torchft.testing.ports import ReservedPort

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "hsdp"
TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"


@pytest.fixture
def lighthouse() -> Iterator[str]:
    server = LighthouseServer("127.0.0.1:0", min_replicas=1, join_timeout_ms=1000)
    yield server.address()
    server.shutdown()


def until(watch: Watch, child: Child, happened: Callable[[Watch], bool]) -> None:
    deadline = Deadline(200)
    while not happened(watch):
        assert child.exit_code() is None, "\n".join(child.last_lines(60))
        assert not deadline.expired, "\n".join(child.last_lines(60))
        child.wait(0.1)
        watch.look()


@contextmanager
def held(child: Child) -> Iterator[None]:
    """torchrun itself stands still; what it started goes on."""
    os.kill(child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)


def second_rank(child: Child) -> int:
    """The process id of a group's rank 1."""
    for pid in child.tree():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if b"RANK=1" in environment and b"train_hsdp.py" in command:
            return pid
    raise AssertionError("there is no rank 1")


def test_a_group_that_loses_a_rank_is_restarted_and_heals_while_the_other_trains(
    tmp_path: Path, lighthouse: str
) -> None:
    total = tmp_path / "total"
    total.write_text("1000000")
    watches = [Watch(tmp_path / f"group{group}.jsonl") for group in (0, 1)]

    script = str(EXAMPLE / "train_hsdp.py")

    def start(group: int, argv: list[str], name: str, **env: str) -> Child:
        return children.start(
            name,
            argv,
            {
                "REPLICA_GROUP_ID": str(group),
                "NUM_REPLICA_GROUPS": "2",
                "CUDA_VISIBLE_DEVICES": "",
                "TORCHFT_LIGHTHOUSE": lighthouse,
                "MIN_STEP_SEC": "0.1",
                "TOTAL_STEPS": f"@{total}",
                "METRICS_FILE": str(watches[group].path),
                "OMP_NUM_THREADS": "1",
                **env,
            },
            tmp_path / f"{name}.log",
        )

    def both(watch: Watch) -> bool:
        return bool(watch.commits) and watch.commits[-1].participants == 2

    with ReservedPort() as kept, Forks() as children:
        rank1, rank0 = (
            start(
                0,
                [sys.executable, script],
                f"group 0, rank {rank}",
                RANK=rank,
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(kept.port),
            )
            for rank in "10"
        )
        argv = [TORCHRUN, "--standalone", "--nproc_per_node=2", "--max_restarts=3", "--", script]
        groups = [rank0, start(1, argv, "group 1")]
        for watch, group in zip(watches, groups, strict=True):
            until(watch, group, both)
        before = watches[1].step
        with held(groups[1]):  # or torchrun may end rank 0 before that says what it sees
            os.kill(second_rank(groups[1]), signal.SIGKILL)
            until(watches[1], groups[1], lambda watch: "This group cannot go on" in groups[1].log.read_text())
        until(watches[1], groups[1], lambda watch: any(heal.step >= before for heal in watch.heals) and both(watch))
        steps = max(300, watches[1].step + 50)  # enough for the accuracy
        new = tmp_path / "new"
        new.write_text(str(steps))
        new.replace(total)
        for watch, group in zip(watches, groups, strict=True):
            assert group.wait(200) == 0, "\n".join(group.last_lines(60))
            watch.look()
        assert rank1.wait(60) == 0, "\n".join(rank1.last_lines(60))

    ends = [watch.end for watch in watches]
    assert all(end is not None and end.step == steps and end.accuracy > 0.95 for end in ends), ends
    assert len({end.state for end in ends if end is not None}) == 1, ends
    trained = [commit.step for commit in watches[0].commits]
    assert trained == list(range(trained[0], steps + 1)), "group 0 went on, step by step"
    check_readme(groups)


def check_readme(groups: list[Child]) -> None:
    """The transcripts in the README consist of lines that are really printed."""
    blocks = re.findall(r"```txt\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.S)
    shown = {shape(line) for block in blocks for line in block.splitlines() if line.strip()}
    assert len(shown) >= 8
    printed = {shape(line) for group in groups for line in group.log.read_text().splitlines()}
    assert shown - printed == set()


def shape(line: str) -> str:
    """A log line without what differs from run to run: times, ids, numbers."""
    line = re.sub(r"^[\d-]+ [\d:,]+ ", "", line.strip())
    line = re.sub(r"[0-9a-f]{8}(-[0-9a-f-]{27}|…)", "N", line)
    line = re.sub(r"\b[0-9a-f]{32}\b", "N", line)
    return re.sub(r"\w[\w.-]*:\d+/|\d+([.:,]\d+)*", "N", line)
