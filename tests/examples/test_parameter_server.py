"""The parameter server example as its README runs it: a worker is killed, another one comes, the rest goes on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.examples.forks import Forks
from torchft.launch.processes import Child, Children
from torchft.testing.ports import ReservedPort
from torchft.testing.wait import wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "parameter_server"


def _start(children: Children, folder: Path, name: str, role: str, port: int, worker: int) -> Child:
    env = {
        "QUICK_RUN": "1",
        "PORT": str(port),
        "REPLICA_GROUP_ID": str(worker),
        "NUM_REPLICA_GROUPS": "3",
        "METRICS_FILE": str(folder / f"{name}.jsonl"),
        "OMP_NUM_THREADS": "1",
    }
    return children.start(name, [sys.executable, str(EXAMPLE / "train_ps.py"), role], env, folder / f"{name}.log")


def _events(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_server_trains_on_while_workers_die_and_come(tmp_path: Path) -> None:
    with ReservedPort() as kept, Children() as children, Forks() as forks:
        port = kept.port
        server = _start(children, tmp_path, "server", "server", port, 0)
        first = _start(children, tmp_path, "first", "worker", port, 1)
        doomed = _start(forks, tmp_path, "doomed", "worker", port, 2)
        wait_until(lambda: len(_events(tmp_path, "doomed")) >= 5, 200, "the doomed worker's fifth gradient")
        doomed.kill()
        late = _start(forks, tmp_path, "late", "worker", port, 2)
        assert server.wait(200) == 0, "\n".join(server.last_lines(40))
        assert first.wait(60) == 0, "\n".join(first.last_lines(40))
        late.wait(60)

    events = _events(tmp_path, "server")
    assert events[-1]["event"] == "end"
    assert events[-1]["updates"] == 250
    assert events[-1]["accuracy"] > 0.85
    given = {e["session"] for e in events if e["event"] == "update"}
    assert len(given) >= 2
    assert len(_events(tmp_path, "first")) > 20

    readme = (EXAMPLE / "README.md").read_text()
    shown = {_shape(line) for block in re.findall(r"```txt\n(.*?)```", readme, re.S) for line in block.splitlines()}
    shown = {line for line in shown if "asking again" not in line}  # that depends on who starts first
    printed = {_shape(line) for child in (server, first) for line in child.log.read_text().splitlines()}
    assert len(shown) >= 5
    assert shown - printed == set()


def _shape(line: str) -> str:
    """A log line without what differs from run to run: date, time, ids, numbers, the error's words."""
    line = re.sub(r"^[\d-]+ [\d:,]+ ", "", line.strip())
    line = re.sub(r"(failed, and is over): .*", r"\1", line)
    line = re.sub(r"[0-9a-f]{8}[0-9a-f]*…?", "N", line)
    return re.sub(r"http://\S+|\d+([.:,]\d+)*", "N", line)
