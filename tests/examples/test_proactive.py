"""The proactive recovery example as its README runs it: what one group's departure costs the other."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.forks import Forks
from torchft.coordination.lighthouse_server import LighthouseServer
from torchft.launch.processes import Child, Children
from torchft.launch.watch import Watch
from torchft.testing.ports import ReservedPort

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ddp_proactive"
TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
STEPS = 10
LEAVING_STEP = 3
HEARTBEAT_TIMEOUT = 3.0
"""Seconds, where it is waited for."""
AT_ONCE = 15.0
"""Seconds, where the heartbeat timeout is twice as long. The gap is a hundredth of it on an idle machine."""


@pytest.fixture
def lighthouse(proactive: bool) -> Iterator[str]:
    # The join timeout is the command's own default: a group that is known to be gone is not waited for.
    limit = 2 * AT_ONCE if proactive else HEARTBEAT_TIMEOUT
    server = LighthouseServer(
        "127.0.0.1:0", min_replicas=1, join_timeout_ms=60_000, heartbeat_timeout_ms=int(limit * 1000)
    )
    yield server.address()
    server.shutdown()


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """One for each group."""
    with ReservedPort() as first, ReservedPort() as second:
        yield [first.port, second.port]


def start(children: Children, folder: Path, lighthouse: str, group: int, how: str, proactive: bool, port: int) -> Child:
    script = [str(EXAMPLE / "train_ddp_proactive.py"), "--leave", how]
    if how == "leave" and proactive and group == 1:  # as in the README, on a port that is free
        argv = [TORCHRUN, f"--master_port={port}", "--nnodes=1", "--nproc_per_node=1", "--", *script]
    else:  # one rank needs no torchrun
        argv = [sys.executable, *script]
    return children.start(
        f"group {group}",
        argv,
        {
            "REPLICA_GROUP_ID": str(group),
            "NUM_REPLICA_GROUPS": "2",
            "TORCHFT_PROACTIVE_RECOVERY": "1" if proactive else "0",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHFT_LIGHTHOUSE": lighthouse,
            "QUICK_RUN": "1",
            "TOTAL_STEPS": str(STEPS),
            "METRICS_FILE": str(folder / f"group{group}.jsonl"),
            "OMP_NUM_THREADS": "1",
        },
        folder / f"group{group}.log",
    )


@pytest.mark.parametrize(
    ("how", "proactive"), [("leave", True), ("leave", False), ("kill", True)], ids=("leaves", "not-proactive", "killed")
)
def test_the_survivor_goes_on_at_once_and_without_proactive_recovery_after_the_timeout(
    tmp_path: Path, lighthouse: str, ports: list[int], how: str, proactive: bool
) -> None:
    with Forks() as children:
        zero, one = [start(children, tmp_path, lighthouse, g, how, proactive, ports[g]) for g in (0, 1)]
        assert zero.wait(200) == 0, "\n".join(zero.last_lines(60))
        ended = one.wait(60)
    watches = [Watch(tmp_path / f"group{group}.jsonl") for group in (0, 1)]
    for watch in watches:
        watch.look()
    survivor, gone = watches

    # Both trained together up to the departure, and only the survivor after it, to the end.
    assert ended == (-signal.SIGKILL if how == "kill" else 0), "\n".join(one.last_lines(60))
    assert [(c.step, c.participants) for c in gone.commits] == [(n, 2) for n in range(1, LEAVING_STEP + 1)]
    assert [(c.step, c.participants) for c in survivor.commits] == [
        (n, 2 if n <= LEAVING_STEP else 1) for n in range(1, STEPS + 1)
    ]
    assert survivor.end is not None
    assert survivor.end.step == STEPS
    if how == "leave":
        # It left between two steps. Where steps stand, the survivor may have begun the next one, which is tried again.
        assert survivor.failed_steps <= (1 if proactive else 0)

    gap = survivor.commits[LEAVING_STEP].time - survivor.commits[LEAVING_STEP - 1].time
    if proactive:
        assert gap < AT_ONCE, "\n".join(zero.last_lines(60))
    else:
        assert gap >= 0.8 * HEARTBEAT_TIMEOUT, "\n".join(zero.last_lines(60))
    if how == "leave":
        check_readme([zero, one], "leave, proactive" if proactive else "leave, not proactive")


def check_readme(groups: list[Child], name: str) -> None:
    """The transcripts in the README consist of lines that are really printed."""
    readme = (EXAMPLE / "README.md").read_text()
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", readme, re.S)
    assert found is not None
    blocks = re.findall(r"```txt\n(.*?)```", found[1], re.S)
    shown = {shape(line) for block in blocks for line in block.splitlines() if line.strip() not in ("", "…")}
    assert len(shown) >= 4
    printed = {shape(line) for group in groups for line in group.log.read_text().splitlines()}
    assert shown - printed == set()


def shape(line: str) -> str:
    """A log line without what differs from run to run (times, ids, numbers), and without the README's comments."""
    line = re.sub(r"\s+# .*", "", line.strip())
    line = re.sub(r"^[\d-]+ (?=\d\d:)", "", line)  # the date
    line = re.sub(r"[0-9a-f]{8}(-[0-9a-f-]{27}|…)", "N", line)
    return re.sub(r"\w[\w.-]*:\d+/|\d+([.:,]\d+)*", "N", line)
