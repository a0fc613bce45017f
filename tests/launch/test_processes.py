"""Children end with all they started, whatever they do against it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchft.launch.processes import Child, Children, terminate_as_interrupt
from torchft.testing.wait import wait_until

# A child as torchrun is one: its grandchild is in a session of its own, and both ignore SIGTERM.
SLEEPER = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(300)
"""
STUBBORN = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=True)
if "orphan" in sys.argv:
    sys.exit(3)
time.sleep(300)
"""


def stubborn(children: Children, log: Path, *arguments: str) -> Child:
    child = children.start("stubborn", [sys.executable, "-c", STUBBORN, *arguments], {}, log)
    wait_until(lambda: "up" in child.last_lines(), 60, "the grandchild to come up")
    return child


def test_kill_takes_the_grandchild_in_another_session(tmp_path: Path) -> None:
    with Children() as children:
        child = stubborn(children, tmp_path / "log")
        assert len(child.tree()) == 2
        child.kill()
        assert child.tree() == []
        assert child.exit_code() == -signal.SIGKILL


def test_stop_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    with Children() as children:
        child = stubborn(children, tmp_path / "log")
        child.stop(grace=0.2)
        assert child.tree() == []


def test_leaving_the_block_ends_a_grandchild_whose_parent_is_gone(tmp_path: Path) -> None:
    with Children(grace=0.2) as children:
        child = stubborn(children, tmp_path / "log", "orphan")
        assert child.wait(60) == 3
        assert len(child.tree()) == 1
    assert child.tree() == []


def test_an_error_in_the_block_ends_the_children(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Children(grace=0.2) as children:  # noqa: PT012
        child = stubborn(children, tmp_path / "log")
        raise ZeroDivisionError
    assert child.tree() == []


def test_sigterm_ends_the_block_as_ctrl_c_does(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        terminate_as_interrupt(),
        Children(grace=0.2) as children,
    ):
        child = stubborn(children, tmp_path / "log")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: False, 5, "the end of this block")
    assert child.tree() == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_while_a_child_is_started_leaves_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt(), Children(grace=0.2) as children:
        children.start("sleeper", [sys.executable, "-c", SLEEPER], {}, tmp_path / "log")
    assert len(started) == 1
    with pytest.raises(ProcessLookupError):  # it has ended and was reaped
        os.kill(started[0], 0)


def test_output_and_exit_code_are_kept(tmp_path: Path) -> None:
    with Children() as children:
        code = "import sys; [print(i) for i in range(30)]; print('why', file=sys.stderr); sys.exit(7)"
        child = children.start("failing", [sys.executable, "-c", code], {}, tmp_path / "log")
        assert child.wait(60) == 7
        assert sorted(child.last_lines(40)) == sorted([*map(str, range(30)), "why"])
        assert len(child.last_lines(5)) == 5


def test_a_child_sees_its_own_variables_and_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    with Children() as children:
        code = "import os; print(os.environ['OURS'] + os.environ['ITS'])"
        child = children.start("printing", [sys.executable, "-c", code], {"ITS": "2"}, tmp_path / "log")
        assert child.wait(60) == 0
        assert child.last_lines() == ["12"]
