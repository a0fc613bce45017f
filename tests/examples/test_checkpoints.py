"""The example of checkpoints as its README runs it: a job that was stopped goes on from the newest one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from tests.forked import ForkedProgram
from torchft.checkpointing import Checkpoints
from torchft.coordination.lighthouse_server import LighthouseServer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "checkpoints" / "train_ddp_checkpoints.py"


def run(
    program: type[Popen[str]] | type[ForkedProgram], lighthouse: str, folder: Path, steps: int
) -> list[dict[str, Any]]:
    """Trains until so many steps are committed; what happened."""
    metrics = folder / f"until-{steps}.jsonl"
    with program(
        [sys.executable, str(EXAMPLE), "--directory", str(folder / "checkpoints"), "--every", "5"],
        env={
            **os.environ,
            "TORCHFT_LIGHTHOUSE": lighthouse,
            "NUM_REPLICA_GROUPS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "QUICK_RUN": "1",
            "TOTAL_STEPS": str(steps),
            "METRICS_FILE": str(metrics),
            "OMP_NUM_THREADS": "1",
        },
        stdout=PIPE,
        stderr=PIPE,
        text=True,
    ) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_a_job_that_is_started_again_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    server = LighthouseServer("127.0.0.1:0", min_replicas=1)
    try:
        first = run(Popen, server.address(), tmp_path, 12)
        newest, _ = Checkpoints(tmp_path / "checkpoints").candidates()[0]
        second = run(ForkedProgram, server.address(), tmp_path, 17)
    finally:
        server.shutdown()
    restored = [e["step"] for e in (*first, *second) if e["event"] == "restored"]
    assert newest in (5, 10)  # on a slow disk that of step 5 may still be being written at step 10
    assert restored == [None, newest]
    assert [e["step"] for e in second if e["event"] == "step"] == list(range(newest + 1, 18))
