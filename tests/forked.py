"""Python programs that start in milliseconds: forks of a process that has imported torch and torchft already.

The idea
    To import torch and torchft costs a process seconds of CPU time, and tests start hundreds. So each process of
    pytest has one nursery (``torchft.runtime.nursery``), and :class:`ForkedProgram` makes a fork of it into the
    program that a command line names: ``__main__``, ``sys.argv``, environment, working folder, standard streams,
    signals and the way it ends are those of a program that was started.

What differs
    It was imported before its environment was there: what a module reads at its import is pytest's, and
    ``OMP_NUM_THREADS`` is 1. ``ps`` shows the nursery's command. It ends with pytest. Where a test is about one of
    these, or about the start, or about what is imported, it uses ``subprocess.Popen``.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torchft.runtime.deadline import Deadline
from torchft.runtime.nursery import Nursery
from torchft.runtime.ready import readable
from torchft.testing.process_state import wait_until_stopped

__all__ = ["ForkedProgram", "child"]

_PRELOAD = [
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torchft.checkpointing.pg_transport",
    "torchft.ddp",
    "torchft.local_sgd",
    "torchft.manager",
    "torchft.optim",
    "torchft.parallel",
    "torchft.testing.faults",
    "tests.forked",
]
_START_TIMEOUT = 60.0
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_nursery = Nursery(_PRELOAD, "nursery of the tests")


class ForkedProgram:
    """As much of ``subprocess.Popen`` as tests use, for Python programs.

    Args:
        argv: ``[sys.executable, "-c", code, ...]`` or ``[sys.executable, script, ...]``.
        stdin, stdout, stderr: as for ``Popen``: None (this process's), ``PIPE``, ``DEVNULL``, a file; ``STDOUT`` for
            ``stderr``.
        env: the whole environment; this process's by default.
        cwd: working folder; this process's by default.
        text: the pipes carry text.

    Raises:
        NurseryError: it could not be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        stdin: IO[Any] | int | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        text: bool = False,
    ) -> None:
        assert argv[0] == sys.executable, argv
        self.args = list(argv)
        self.returncode: int | None = None
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None
        self.stderr: IO[Any] | None = None
        self._lock = threading.Lock()
        theirs: list[int] = []
        try:
            for number, given in enumerate((stdin, stdout, stderr)):
                theirs.append(self._stream(number, given, theirs, text))
            arguments = {
                "argv": self.args[1:],
                "environment": dict(os.environ if env is None else env),
                "cwd": str(cwd or Path.cwd()),
                "ignored": [int(n) for n in _ENDING_SIGNALS if signal.getsignal(n) is signal.SIG_IGN],
            }
            self._process = _nursery.spawn("tests.forked:run", arguments, theirs, Deadline(_START_TIMEOUT))
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.pid = self._process.pid
        self._handle = os.pidfd_open(self.pid)

    def _stream(self, number: int, given: IO[Any] | int | None, before: list[int], text: bool) -> int:
        """The child's end, and ours if there is one."""
        if given == subprocess.PIPE:
            read, write = os.pipe()
            ours, theirs = (write, read) if number == 0 else (read, write)
            stream: IO[Any] = open(ours, "wb" if number == 0 else "rb", buffering=-1)  # noqa: SIM115
            if text:
                stream = io.TextIOWrapper(stream, write_through=number == 0)
            setattr(self, ("stdin", "stdout", "stderr")[number], stream)
            return theirs
        if given == subprocess.STDOUT:
            return os.dup(before[1])
        if given == subprocess.DEVNULL:
            return os.open(os.devnull, os.O_RDWR)
        if given is None:
            return os.dup(number)
        return os.dup(given if isinstance(given, int) else given.fileno())

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that ended it), or None if it still runs."""
        with self._lock:
            if self.returncode is None:
                self.returncode = self._process.wait(0)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        readable(self._handle, 1e6 if timeout is None else timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def wait_until_stopped(self, timeout: float = 60.0) -> None:
        """As :func:`torchft.testing.process_state.wait_until_stopped`."""
        wait_until_stopped(self.pid, timeout)

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Ends its input, and waits for its end: its output and its errors' output, as far as they are pipes.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        deadline = Deadline(1e6 if timeout is None else timeout)
        if self.stdin is not None:
            self.stdin.close()
        read: dict[IO[Any], Any] = {}
        streams = [s for s in (self.stdout, self.stderr) if s is not None]
        readers = [threading.Thread(target=lambda s=s: read.update({s: s.read()}), daemon=True) for s in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(deadline.remaining())
        self.wait(deadline.remaining())
        if any(reader.is_alive() for reader in readers):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return tuple(None if s is None else read[s] for s in (self.stdout, self.stderr))

    def send_signal(self, number: signal.Signals) -> None:
        self._process.signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> ForkedProgram:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


# --------------------------------------------------------------------------------------------------- in the child


def run(arguments: dict[str, Any], files: list[int]) -> None:
    """Becomes the program. Does not return."""
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(arguments["environment"])
    os.chdir(arguments["cwd"])
    for number in _ENDING_SIGNALS:  # what is ignored here is ignored there, as in a shell's background job
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in arguments["ignored"] else default)
    _exit(_exit_code(arguments["argv"]))


def _exit_code(argv: list[str]) -> int:
    try:
        _run_as_main(argv)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _run_as_main(argv: list[str]) -> None:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        code = compile(argv[1], "<string>", "exec")
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        main.__file__ = argv[0]
        code = compile(Path(argv[0]).read_text(), argv[0], "exec")
    exec(code, main.__dict__)


def _exit(code: int) -> None:
    """As the interpreter ends: threads are waited for, what is registered for the end runs, everything is torn down."""
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    ctypes.pythonapi.Py_Exit(code)


@contextmanager
def child(code: str, *args: str) -> Iterator[ForkedProgram]:
    """A program that is written to and read from by pipes, and killed at the end."""
    process = ForkedProgram(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
