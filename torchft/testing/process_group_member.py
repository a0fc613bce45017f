"""One member of a process group in a process of its own, told what to do line by line.

:class:`Member` is the test's end. Commands and answers are lines of JSON, so that a member can be stopped, killed and
asked again at any point. Members are forked off a process that has imported everything
(:mod:`torchft.runtime.nursery`), which makes them cheap; ``python -m torchft.testing.process_group_member`` is one
that ends as a program does.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import IO, Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from torchft.process_group import ProcessGroup, ProcessGroupGloo
from torchft.process_group.baby.group import use_nursery
from torchft.process_group.rendezvous import RendezvousStore
from torchft.runtime.deadline import Deadline
from torchft.runtime.nursery import Nursery
from torchft.testing.process_state import wait_until_stopped

__all__ = ["Member", "StoppingGloo", "run"]

_START_TIMEOUT = 60.0
_nursery = Nursery(["torchft.testing.process_group_member"], "nursery of members")


class Member:
    """A member process. Use as a context manager: it is killed at the end.

    Args:
        factory: ``module:Class`` of the group, called with ``timeout``.
        timeout: of the group, seconds.
        env: added to the environment.
        program: it is a Python program of its own, which takes seconds to start and ends as one.
    """

    def __init__(
        self, factory: str, timeout: float = 30.0, env: dict[str, str] | None = None, program: bool = False
    ) -> None:
        read_commands, write_commands = os.pipe()
        read_answers, write_answers = os.pipe()
        try:
            if program:
                self._program = subprocess.Popen(
                    [sys.executable, "-m", "torchft.testing.process_group_member", factory, str(timeout)],
                    stdin=read_commands,
                    stdout=write_answers,
                    env={**os.environ, **(env or {})},
                )
                self.pid = self._program.pid
            else:
                arguments = {"factory": factory, "timeout": timeout, "env": env or {}}
                files = [read_commands, write_answers]
                target = "torchft.testing.process_group_member:run"
                self._child = _nursery.spawn(target, arguments, files, Deadline(_START_TIMEOUT))
                self.pid = self._child.pid
        finally:
            os.close(read_commands)
            os.close(write_answers)
        self._is_program = program
        self._commands: IO[str] = os.fdopen(write_commands, "w")
        self._replies: IO[str] = os.fdopen(read_answers)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._replies:
            self._answers.put(json.loads(line))

    def tell(self, command: str, **arguments: Any) -> None:
        """Sends a command without waiting for its answer."""
        self._commands.write(json.dumps({"command": command, **arguments}) + "\n")
        self._commands.flush()

    def answer(self, deadline: float = 60.0) -> dict[str, Any]:
        """The next answer: ``{"value": …, "error": … or None, "seconds": …}``.

        Raises:
            TimeoutError: none came within ``deadline`` seconds.
        """
        try:
            return self._answers.get(timeout=deadline)
        except queue.Empty:
            raise TimeoutError(f"no answer of member {self.pid} within {deadline:g} s") from None

    def ask(self, command: str, deadline: float = 60.0, **arguments: Any) -> dict[str, Any]:
        """:meth:`tell` and :meth:`answer`."""
        self.tell(command, **arguments)
        return self.answer(deadline)

    def stop(self) -> None:
        """The process stands still (SIGSTOP), its connections stay open."""
        self._signal(signal.SIGSTOP)

    def wait_until_stopped(self, deadline: float = 60.0) -> None:
        """As :func:`torchft.testing.process_state.wait_until_stopped`."""
        wait_until_stopped(self.pid, deadline)

    def kill(self) -> None:
        """The process dies at once."""
        self._signal(signal.SIGKILL)
        self.wait(30)

    def wait(self, deadline: float = 60.0) -> int:
        """The exit code of a member that ends by itself."""
        code = self._program.wait(timeout=deadline) if self._is_program else self._child.wait(deadline)
        if code is None:
            raise TimeoutError(f"member {self.pid} did not end within {deadline:g} s")
        return code

    def _signal(self, number: signal.Signals) -> None:
        self._program.send_signal(number) if self._is_program else self._child.signal(number)

    def __enter__(self) -> Member:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._reader.join(timeout=30)
        self._replies.close()
        try:
            self._commands.close()
        except BrokenPipeError:
            pass  # a command that the killed process never read


_STOP_TOO = "TORCHFT_TEST_STOP_TOO"


def _stop_once_told(pids: list[int]) -> None:
    """From now on these processes stand still as soon as a group of this one has told the others where it is."""

    def set_and_stop(store: RendezvousStore, key: str, value: bytes | str) -> None:
        plain(store, key, value)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

    plain = RendezvousStore.set
    RendezvousStore.set = set_and_stop  # type: ignore[method-assign, assignment]


class StoppingGloo(ProcessGroupGloo):
    """Hosted by the child of a member that is to stand still."""

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout)
        _stop_once_told([int(os.environ[_STOP_TOO]), os.getpid()])


class _Loop:
    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def configure(self, store_addr: str, rank: int, world_size: int) -> None:
        self._group.configure(store_addr, f"member{rank}", rank, world_size)

    def configure_and_stop(self, store_addr: str, rank: int, world_size: int) -> None:
        """Tells the others where it is, and stands still at once, with the child that carries its collectives."""
        if hasattr(self._group, "_host"):
            os.environ[_STOP_TOO] = str(os.getpid())
            self._group._host = f"{__name__}:StoppingGloo"
        else:
            _stop_once_told([os.getpid()])
        self.configure(store_addr, rank, world_size)

    def allreduce(self, value: float = 1.0, elements: int = 4) -> float:
        tensor = torch.full((elements,), value)
        self._group.allreduce([tensor]).wait()
        return float(tensor[0])

    def allreduce_and_abort_on_error(self) -> float:
        """What a Manager does: let go of the others when a collective fails."""
        try:
            return self.allreduce()
        except Exception:
            self._group.abort()
            raise

    def issue_and_exit(self) -> None:
        self.pending = self._group.allreduce([torch.ones(1)])
        sys.exit(7)

    def fork_data_workers(self, workers: int = 2) -> list[int]:
        """Process ids of data-loader workers, which live on when this process is killed."""
        data = TensorDataset(torch.arange(1000.0))
        self.batches = iter(DataLoader(data, num_workers=workers, multiprocessing_context="fork"))
        next(self.batches)
        return [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]

    def recv(self, source: int) -> float:
        tensor = torch.zeros(1)
        self._group.recv([tensor], source, 0).wait()
        return tensor.item()

    def send(self, target: int, elements: int = 1) -> None:
        self._group.send([torch.ones(elements)], target, 0).wait()

    def recv_and_abort_on_error(self, source: int) -> float:
        try:
            return self.recv(source)
        except Exception:
            self._group.abort()
            raise

    def allreduce_aborted_after(self, seconds: float) -> float:
        timer = threading.Timer(seconds, self._group.abort)
        timer.start()
        try:
            return self.allreduce()
        finally:
            timer.join()

    def child(self) -> int | None:
        """The process id of the child that carries the collectives."""
        pid: int | None = getattr(self._group, "child_pid", None)
        return pid

    def errored(self) -> str | None:
        error = self._group.errored()
        return None if error is None else str(error)


def run(arguments: dict[str, Any], files: list[int]) -> None:
    """A forked member's life. ``files``: where commands come from, and where answers go."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(arguments["env"])
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    if "Baby" in arguments["factory"]:
        children = Nursery([], "baby nursery of a member", by_fork=True)  # it has imported everything already
        children.start()
        use_nursery(children)
    with open(0) as commands, open(1, "w", closefd=False) as answers:
        _serve(arguments["factory"], arguments["timeout"], commands, answers)


def _serve(factory: str, timeout: float, commands: IO[str], answers: IO[str]) -> None:
    module, _, name = factory.partition(":")
    torch.set_num_threads(1)
    group: ProcessGroup = getattr(importlib.import_module(module), name)(timeout=timedelta(seconds=timeout))
    loop = _Loop(group)
    for line in commands:
        arguments = json.loads(line)
        command = arguments.pop("command")
        begun = time.monotonic()
        value, error = None, None
        try:
            value = getattr(loop, command)(**arguments)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        answer = {"value": value, "error": error, "seconds": time.monotonic() - begun}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]), sys.stdin, sys.stdout)
