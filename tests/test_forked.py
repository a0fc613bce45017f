"""A forked program is to its test what a started one is."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired

import pytest

from tests.forked import ForkedProgram

WAIT = 60.0

SHOWS = """
import os, signal, sys
mark = object()
assert __name__ == "__main__" and sys.modules["__main__"].mark is mark
print(sys.argv[1:], sorted(os.environ.items()), os.getcwd(), sys.path[0], sys.stdin.read())
print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE)])
print("an error", file=sys.stderr)
"""


@pytest.mark.parametrize("file", [False, True], ids=["code", "script"])
def test_it_has_the_arguments_environment_folder_streams_and_signals_of_a_started_one(
    tmp_path: Path, file: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHOWS)
    argv = [sys.executable, *([str(script)] if file else ["-c", SHOWS]), "one", "--two"]
    environment = {"A": "b", "LC_CTYPE": "C.UTF-8"}  # the latter is what Python sets where there is none
    found = []
    for program in (ForkedProgram, Popen):
        with program(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=tmp_path, env=environment) as process:
            assert process.stdin is not None
            process.stdin.write("what is said to it")
            process.stdin.flush()
            found.append((process.communicate(timeout=WAIT), process.returncode))
    assert found[0] == found[1]
    (out, err), code = found[0]
    assert "what is said to it" in out
    assert (err, code) == ("an error\n", 0)


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("sys.exit(3)", 3),
        ("sys.exit('a reason')", 1),
        ("sys.excepthook = lambda *_: print('hooked'); 1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os._exit(4)", 4),
        ("atexit.register(print, 'at the end'); threading.Timer(0.05, print, ['of a thread']).start()", 0),
        ("class A:\n  def __del__(self): os.write(1, b'torn down')\na = A()", 0),
    ],
    ids=["code", "reason", "exception", "interrupt", "signal", "at once", "threads", "teardown"],
)
def test_it_ends_as_a_started_one_does(code: str, ends: int) -> None:
    found = []
    for program in (ForkedProgram, Popen):
        argv = [sys.executable, "-c", f"import atexit, os, signal, sys, threading\n{code}"]
        with program(argv, stdout=PIPE, stderr=PIPE, text=True) as process:
            out, err = process.communicate(timeout=WAIT)
            found.append((process.returncode, out, err.splitlines()[-1:]))
    assert found[0] == found[1]
    assert found[0][0] == ends


def test_one_that_waits_can_be_waited_for_stopped_and_killed() -> None:
    with ForkedProgram([sys.executable, "-c", "print('here', flush=True); input()"], stdin=PIPE, stdout=PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        assert child.poll() is None
        with pytest.raises(TimeoutExpired):
            child.wait(0.01)
        child.send_signal(signal.SIGSTOP)
        child.kill()
        assert child.wait(WAIT) == child.poll() == child.returncode == -signal.SIGKILL
        child.kill()  # nobody is hit


def test_errors_go_with_the_output_where_that_is_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        code = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
        assert ForkedProgram([sys.executable, "-c", code], stdout=file, stderr=STDOUT).wait(WAIT) == 0
    assert log.read_text() == "out\nerr\n"


def test_what_it_is_forked_from_has_one_thread_and_no_device() -> None:
    code = """
import os, torch
print(len(os.listdir(f"/proc/{os.getppid()}/task")), torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())
"""
    with ForkedProgram([sys.executable, "-c", code], stdout=PIPE, text=True) as child:
        assert child.communicate(timeout=WAIT)[0] == "1 False False\n"
