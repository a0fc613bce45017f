"""``torchft demo``: says what happened, ends with 0 only if all of it went well, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchft.cli.demo import demo as demo_command
from torchft.cli.demo import judge
from torchft.launch.processes import Child, Children
from torchft.launch.stage import Life
from torchft.launch.watch import Watch

ROOT = Path(__file__).resolve().parents[2]

# A group without torchft, which takes a second instead of a minute: it reports what a training group would, and
# FAKE says what goes wrong. Group 0 "heals" from what group 1 has reported.
FAKE_GROUP = """
import json, os, sys, time
from collections.abc import Iterator
from pathlib import Path

group, fake, total = os.environ["REPLICA_GROUP_ID"], os.environ["FAKE"], Path(os.environ["TOTAL_STEPS"][1:])
out = Path(os.environ["METRICS_FILE"])
alive = out.parent / "alive"

def say(event, **values):
    with open(out, "a") as f:
        f.write(json.dumps({"event": event, "time": time.time(), "pid": os.getpid(), **values}) + "\\n")

def others_step():
    lines = (out.parent / "group1-life1.jsonl").read_text().splitlines()
    return max(json.loads(line).get("step", 0) for line in lines)

def together():
    try:
        return bool(open(f"/proc/{alive.read_text()}/environ").read())  # empty, or none, when it is dead
    except OSError:
        return False

say("start")
print(f"group {group} says hello", flush=True)
if fake == "crash" and group == "1":
    sys.exit("no such luck")
step = 0
if group == "0":
    while not step:
        step = others_step()
    say("healed", step=step, bytes=1000000)
    alive.write_text(str(os.getpid()))
while step < int(total.read_text()):
    time.sleep(0.005)
    if fake == "hang" and step > 20:
        continue
    step += 1
    say("step", step=step, participants=1 + together(), loss=0.1)
say("end", step=step, accuracy=0.98, state=group if fake == "differ" else "same")
"""


@pytest.fixture
def children() -> Iterator[Children]:
    """Ends the demo, and what it left, whatever a test does."""
    with Children(grace=0) as owner:
        yield owner


def demo(children: Children, folder: Path, fake: str, *options: str) -> Child:
    script = folder / "fake_group.py"
    script.write_text(FAKE_GROUP)
    arguments = ["demo", "--script", str(script), "--keep-logs", str(folder / "logs"), "--steps", "50", *options]
    return children.start(
        "demo",
        [sys.executable, "-m", "torchft.cli.main", *arguments],
        {"FAKE": fake, "PYTHONPATH": str(ROOT)},
        folder / "output",
    )


def ended(run: Child) -> tuple[int | None, str]:
    """The exit code and the output of a demo that ends by itself. Nothing that it started still runs then."""
    code = run.wait(280)
    assert code is not None, run.log.read_text()
    assert run.tree() == []
    return code, run.log.read_text()


@pytest.mark.parametrize(
    ("fake", "complaint"),
    [
        ("differ", r"FAILED.*states identical.*no"),
        ("crash", r"(?s)FAILED.*group 1 ended with exit code 1.*no such luck"),
    ],
)
def test_the_exit_code_is_1_when_something_went_wrong(
    children: Children, tmp_path: Path, fake: str, complaint: str
) -> None:
    code, output = ended(demo(children, tmp_path, fake, "--json", str(tmp_path / "result.json")))
    assert code == 1, output
    assert json.loads((tmp_path / "result.json").read_text())["ok"] is False
    assert re.search(complaint, output), output


def test_a_result_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo_command, ["--json", str(tmp_path / "nowhere" / "result.json")])
    assert result.exit_code == 2
    assert "--json" in result.output
    assert "nowhere" in result.output


def test_the_story_is_told_and_the_exit_code_is_0_when_all_went_well(children: Children, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "torchft.cli.main", "demo", "--steps", "100", "--transport", "http"]
    argv += ["--state-mb", "10", "--json", str(tmp_path / "result.json"), "--keep-logs", str(tmp_path / "logs")]
    code, output = ended(children.start("demo", argv, {"PYTHONPATH": str(ROOT)}, tmp_path / "output"))
    assert code == 0, output
    told = ["alone", "joins late", "SIGKILL", "after the kill", "restarted", "states identical"]
    assert [part for part in told if part not in output] == []
    assert "FAILED" not in output
    result = json.loads((tmp_path / "result.json").read_text())
    assert [check["what"] for check in result["checks"] if not check["holds"]] == []
    assert result["ok"] is True
    assert min(result["accuracy"]) > 0.95
    assert result["kill_to_next_commit_sec"] > 0
    assert len(result["transfers"]) == 2  # the late join and the restart
    assert all(transfer["bytes"] > 10e6 for transfer in result["transfers"])


def reported(folder: Path, group: int, number: int, events: list[dict[str, object]]) -> Life:
    """A life that reported these events."""
    watch = Watch(folder / f"group{group}-life{number}.jsonl")
    watch.path.write_text("".join(json.dumps({"time": 1.0 * i, **e}) + "\n" for i, e in enumerate(events)))
    watch.look()
    with Children() as children:
        child = children.start(f"group {group}", ["true"], {}, watch.path.with_suffix(".log"))
    return Life(group, child, watch, killed=1.0 if (group, number) == (0, 1) else None)


def steps(first: int, last: int, participants: int) -> list[dict[str, object]]:
    return [
        {"event": "step", "step": step, "participants": participants, "loss": 0.1} for step in range(first, last + 1)
    ]


def lives(folder: Path, change: str = "") -> list[Life]:
    """A run of ten steps in which all went well, but for ``change``."""
    survivor = [*steps(1, 2, 1), *steps(3, 5, 2), *steps(6, 6, 1), *steps(7, 10, 2)]
    late = [{"event": "healed", "step": 2, "bytes": 9}, *steps(3, 5, 2)]
    back = [{"event": "healed", "step": 6, "bytes": 9}, *steps(7, 10, 2)]
    end = {"event": "end", "step": 10, "accuracy": 0.97, "state": "abc"}
    theirs = dict(end)
    match change:
        case "a step is missing":
            del survivor[4]
        case "a step came twice":
            survivor.insert(4, survivor[4])
        case "the other accuracy is low":
            theirs["accuracy"] = 0.95
        case "the states differ":
            theirs["state"] = "abd"
        case "the other ended early":
            theirs["step"] = 9
        case "one group did not heal":
            del back[0]
        case "one group never took part":
            back[1:] = steps(7, 10, 1)
    return [
        reported(folder, 1, 1, [*survivor, end]),
        reported(folder, 0, 1, late),
        reported(folder, 0, 2, [*back, theirs] if change != "the other did not end" else back),
    ]


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("", set()),
        ("a step is missing", {"the survivor lost no step"}),
        ("a step came twice", {"the survivor lost no step"}),
        ("the other accuracy is low", {"accuracy on held-out digits"}),
        ("the states differ", {"states identical"}),
        ("the other ended early", {"steps committed"}),
        ("one group did not heal", {"recoveries"}),
        ("one group never took part", {"recoveries"}),
        ("the other did not end", {"steps committed", "states identical", "accuracy on held-out digits"}),
    ],
)
def test_each_closing_check_fails_for_its_own_reason(tmp_path: Path, change: str, broken: set[str]) -> None:
    checks = judge(10, lives(tmp_path, change))
    assert {check.what for check in checks if not check.holds} == broken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_groups(children: Children, tmp_path: Path, number: signal.Signals) -> None:
    run = demo(children, tmp_path, "hang")
    group = tmp_path / "logs" / "group1-life1.log"
    deadline = time.monotonic() + 90
    while not group.exists() or "group 1 says hello" not in group.read_text():
        assert run.exit_code() is None, run.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(run.tree()) >= 3
    os.kill(run.pid, number)
    code, output = ended(run)
    assert code == 130, output
    assert "interrupted" in output
