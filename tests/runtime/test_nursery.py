"""Children of a nursery begin clean and quickly, and never outlive whom they were made for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from torchft.runtime.deadline import Deadline
from torchft.runtime.nursery import Nursery, NurseryError
from torchft.testing.process_state import lives
from torchft.testing.wait import wait_until


def report(arguments: dict[str, Any], files: list[int]) -> int:
    """Runs in a child: what it finds."""
    found = {
        "said": arguments["say"],
        "mark": os.environ.get("NURSERY_MARK"),
        "sockets": sum(os.readlink(f"/proc/self/fd/{n}").startswith("socket:") for n in _descriptors()),
        "preloaded": "torchft.core.membership" in sys.modules,
    }
    os.write(files[0], json.dumps(found).encode())
    return 3


def sleep(arguments: dict[str, Any], files: list[int]) -> None:
    """Runs in a child: until it is killed."""
    os.write(files[0], b"begun")
    while True:
        signal.pause()


def _descriptors() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the listing's own
        found.append(int(name))
    return found


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(["torchft.core.membership", "tests.runtime.test_nursery"], "nursery of the test")
    yield nursery
    nursery.close()


def _begin(nursery: Nursery, function: str, **arguments: Any) -> tuple[Any, bytes]:
    read, write = os.pipe()
    child = nursery.spawn(f"tests.runtime.test_nursery:{function}", arguments, [write], Deadline(60))
    os.close(write)
    said = os.read(read, 65536)
    os.close(read)
    return child, said


def test_a_child_has_the_imports_the_environment_and_nothing_else(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NURSERY_MARK", "set after the nursery began")
    child, said = _begin(nursery, "report", say="hello")
    assert json.loads(said) == {
        "said": "hello",
        "mark": "set after the nursery began",
        "sockets": 0,
        "preloaded": True,
    }
    assert child.wait(60) == 3
    assert child.wait(60) == 3  # asked again


def test_a_child_ignores_the_signals_to_end_and_dies_of_a_kill(nursery: Nursery) -> None:
    child, said = _begin(nursery, "sleep")
    assert said == b"begun"
    child.signal(signal.SIGTERM)
    child.signal(signal.SIGINT)
    assert child.wait(0.1) is None
    child.signal(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    child.signal(signal.SIGKILL)  # a signal to one that is gone hits nobody


def test_children_end_with_the_nursery_and_the_next_one_begins_anew(nursery: Nursery) -> None:
    child, _ = _begin(nursery, "sleep")
    nursery.close()
    assert child.wait(60) == -signal.SIGKILL
    assert _begin(nursery, "report", say="again")[1]


def test_waiting_for_a_nursery_ends_when_nobody_wants_the_child_and_at_the_deadline() -> None:
    slow = Nursery(["tests.runtime.test_nursery", "torch"], "slow nursery")
    with pytest.raises(NurseryError, match="not waited for"):
        slow.spawn("x:y", {}, [], Deadline(60), lambda: False)
    with pytest.raises(NurseryError, match=r"within 0\.01 s"):
        slow.spawn("x:y", {}, [], Deadline(0.01))
    slow.close()


_OWNER = """
import os, sys
from torchft.runtime.deadline import Deadline
from torchft.runtime.nursery import Nursery
nursery = Nursery(["tests.runtime.test_nursery"], "nursery of the owner")
read, write = os.pipe()
child = nursery.spawn("tests.runtime.test_nursery:sleep", {}, [write], Deadline(60))
os.read(read, 10)
print(nursery._process.pid, child.pid, flush=True)
if os.fork() == 0:  # a data-loader worker, which lives on
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()  # until it is killed
"""


def test_nobody_outlives_a_killed_owner_even_when_its_forked_workers_do() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(lives, pids))
    owner.kill()
    owner.wait(60)
    wait_until(lambda: not any(map(lives, pids)), 60, "the end of the nursery and its child")
    owner.communicate(timeout=60)  # the worker ends when its input does
