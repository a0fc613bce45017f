"""``torchft simulate`` as a person uses it: a search, a schedule of one's own, a failure, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchft.cli import simulate as module
from torchft.cli.main import cli
from torchft.testing.process_state import lives
from torchft.testing.simulation import Parts, Schedule, Summary, run_seeds
from torchft.testing.simulation import minimal as real_minimal
from torchft.testing.simulation import run as real_run
from torchft.testing.simulation.trainer import Trainer
from torchft.testing.wait import wait_until

ROOT = Path(__file__).parents[2]


def test_a_search_ends_with_a_summary_and_0() -> None:
    done = CliRunner().invoke(cli, ["simulate", "--seeds", "60", "--replicas", "2-3", "--start", "7"])
    assert done.exit_code == 0, done.output
    assert "60 schedules" in done.output
    assert "60  schedules saw steps without asking" in done.output
    assert "0  violations" in done.output


def test_a_schedule_of_ones_own_is_run_with_its_trace(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("seed 1\nsettings replicas=2\nat 2 crash L0 for 1\n")
    done = CliRunner().invoke(cli, ["simulate", "--replay", str(file), "--lines", "1000"])
    assert done.exit_code == 0, done.output
    assert "2.0000  *   at 2 crash L0 for 1" in done.output
    assert "no invariant is broken" in done.output


def test_a_schedule_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong"
    file.write_text("seed 1\nat 2 explode L0\n")
    done = CliRunner().invoke(cli, ["simulate", "--replay", str(file)])
    assert done.exit_code == 1
    assert "line 2, 'at 2 explode L0': there is no fault 'explode'" in done.output


@pytest.mark.parametrize(("text", "says"), [("some", "neither a number"), ("5-2", "the smaller one first"), ("0", "1")])
def test_a_number_of_replicas_that_is_none_is_refused(text: str, says: str) -> None:
    done = CliRunner().invoke(cli, ["simulate", "--replicas", text])
    assert done.exit_code == 2
    assert says in done.output


def test_a_violation_is_explained_by_a_schedule_that_can_be_run_again_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class DividesByOneMore(Trainer):
        def _commit(self) -> None:
            if self.step == 9 and self._part is not None:
                self._part = type(self._part)(self._part.rank, self._part.world_size + 1)
            super()._commit()

    parts = Parts(trainer=DividesByOneMore)

    def broken(seeds: range, replicas: tuple[int, int], stories: tuple[str, ...]) -> Summary:
        return run_seeds(seeds, replicas, stories, parts)

    monkeypatch.setattr(module, "run_seeds", broken)
    monkeypatch.setattr(module, "minimal", lambda failed: real_minimal(failed, parts, tries=60))
    done = CliRunner().invoke(cli, ["simulate", "--seeds", "30", "--lines", "30"])
    assert done.exit_code == 1, done.output
    assert "invariant 1 broken" in done.output
    assert " more" in done.output
    text = done.output.partition("--replay FILE:\n")[2].lstrip().partition("\n\n")[0]
    again = real_run(Schedule.parse(text), parts)
    assert again.violation is not None
    assert again.violation.invariant == 1


@pytest.mark.parametrize(("jobs", "how"), [("1", "SIGTERM"), ("2", "Ctrl-C"), ("2", "SIGKILL")])
def test_however_a_search_is_ended_its_processes_end_and_it_tells_how_far_it_came(jobs: str, how: str) -> None:
    command = [sys.executable, "-m", "torchft.cli.main", "simulate", "--seeds", "1000000", "--jobs", jobs]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "seeds 0 to 999999, 2 to 6 groups, all faults\n"
        wait_until(lambda: jobs == "1" or len(_workers(child.pid)) == 2, 60, "starting the workers")
        workers = _workers(child.pid)
        if how == "Ctrl-C":
            os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
        else:
            child.send_signal(getattr(signal, how))
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    if how != "SIGKILL":
        assert child.returncode == 130, output
        assert "interrupted" in output
        assert "Traceback" not in output
    wait_until(lambda: not any(map(lives, workers)), 60, "their end")


def _workers(pid: int) -> list[int]:
    """The workers of this process that have begun to work: they ignore SIGINT then."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if _ignores(int(child), signal.SIGINT)]


def _ignores(pid: int, number: signal.Signals) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"spawn_main" in command and bool(int(ignored.split()[1], 16) >> (number - 1) & 1)
