"""Child processes that end when their owner does, with all that they started.

A training group is a tree: torchrun, its worker, the worker's data loaders. torchrun puts its worker into a
session of its own, and a child whose parent died belongs to init: neither the process group nor the parent's
id finds the whole tree. So a child is started with a mark in its environment, which everything below it
inherits, and the tree is all processes that carry the mark.

Rules:

- :meth:`Child.kill` takes the whole tree at once, as the loss of a machine does; :meth:`Child.stop` asks
  first (SIGTERM).
- A signal goes to a process only after its mark was read through a handle of it, so a reused id is never hit.
- :class:`Children` is the owner: leaving its ``with`` block, for whatever reason, ends all of them.

The mark is read from ``/proc``; where there is none (macOS), a tree is what torchrun's own shutdown and the
process group of the child reach.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torchft.runtime.deadline import Deadline

__all__ = ["Child", "Children", "terminate_as_interrupt"]

logger = logging.getLogger(__name__)


class Child:
    """A program that runs, with everything it starts. Standard input is empty, both outputs go to one file.

    Args:
        name: what people call it.
        argv: the program and its arguments.
        env: variables added to those of this process.
        log: the file its output is appended to.

    Raises:
        OSError: the program cannot be started or the file not be written.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        # A variable of its own for each child: a child's children may be marked by it, and by whom they
        # start, too.
        self._mark = f"TORCHFT_CHILD_{uuid.uuid4().hex}"
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                list(argv),
                env={**os.environ, **env, self._mark: "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal reaches the owner only, which then ends its children
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """Its exit code, or None if it still runs after ``timeout`` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def tree(self) -> list[int]:
        """The ids of all living processes of the tree, the child itself included."""
        return [pid for pid in _process_ids() if _carries(pid, self._mark)]

    def kill(self, timeout: float = 30.0) -> None:
        """SIGKILL to the whole tree; returns when nothing of it is left.

        Raises:
            TimeoutError: something of it is still there after ``timeout`` seconds.
        """
        deadline = Deadline(timeout)
        # The root cannot start anything more once it is stopped; what its descendants start is met in the
        # next round.
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGSTOP)
        while True:
            for pid in self.tree():
                self._signal(pid, signal.SIGKILL)
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.wait(min(0.1, deadline.remaining()))
            if self._process.poll() is not None and not self.tree():
                return
            if deadline.expired:
                raise TimeoutError(f"{self.name}: processes {self.tree()} are still there {timeout:g} s after SIGKILL")

    def stop(self, grace: float = 5.0) -> None:
        """SIGTERM to the child, ``grace`` seconds to end by itself, then :meth:`kill` for what is left."""
        self.terminate()
        self.wait(grace)
        self.kill()

    def terminate(self) -> None:
        """SIGTERM to the child itself, if it still runs: torchrun ends its worker then."""
        self._process.terminate()

    def last_lines(self, count: int = 20) -> list[str]:
        """The end of its output."""
        try:
            with open(self.log, encoding="utf-8", errors="replace") as lines:
                return [line.rstrip("\n") for line in deque(lines, count)]
        except FileNotFoundError:
            return []

    def _signal(self, pid: int, number: signal.Signals) -> None:
        try:
            handle = os.pidfd_open(pid)
        except OSError:  # it is gone
            return
        try:
            if _carries(pid, self._mark):
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass  # it is gone
        finally:
            os.close(handle)


class Children:
    """The owner of some children: they end when its ``with`` block does."""

    def __init__(self, grace: float = 3.0) -> None:
        self._grace = grace
        self._children: list[Child] = []

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        """As :class:`Child`."""
        with _deferred():  # an interrupt in the middle would leave a child that nobody owns
            child = Child(name, argv, env, log)
            self._children.append(child)
        return child

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children)

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _uninterrupted():
            # All are asked first, so that their graces run at the same time.
            for child in self._children:
                child.terminate()
            deadline = Deadline(self._grace)
            for child in self._children:
                child.wait(deadline.remaining())
                try:
                    child.kill()
                except TimeoutError:
                    logger.exception("%s could not be ended", child.name)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM, and SIGHUP of a terminal that closes, raise KeyboardInterrupt as Ctrl-C does: all ways to
    end a program clean up alike.

    Main thread only.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        _restore(former)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """A signal to end that comes inside has its effect at the end of the block.

    By Python handlers and not by a signal mask: a child would inherit the mask and be deaf to SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    former = {
        number: signal.signal(number, lambda caught_number, _: caught.append(caught_number)) for number in _ENDING
    }
    try:
        yield
    finally:
        _restore(former)
    for number in caught[:1]:
        signal.raise_signal(number)


def _restore(former: Mapping[signal.Signals, Any]) -> None:
    for number, handler in former.items():
        signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Inside, a second Ctrl-C or SIGTERM does not cut the cleaning up short. It takes a bounded time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        _restore(former)


def _process_ids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []


def _carries(pid: int, mark: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            return f"{mark}=1".encode() in environ.read().split(b"\0")
    except OSError:  # it is gone, or another user's
        return False
