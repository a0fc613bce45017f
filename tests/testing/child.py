"""A small Python program under test: it prints JSON lines, and its log goes to standard error."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchft.runtime.deadline import Deadline
from torchft.testing.process_state import state_of

_PREAMBLE = """
import json, os, signal, sys, threading, time
from torchft.testing import faults
def say(**event): print(json.dumps(event), flush=True)
"""


class Child:
    """A running program."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._log = log
        self._buffer = b""

    def event(self, timeout: float = 60.0) -> dict[str, Any]:
        """The next one."""
        deadline = Deadline(timeout)
        assert self.process.stdout is not None
        while b"\n" not in self._buffer:
            if not select.select([self.process.stdout], [], [], deadline.remaining())[0]:
                raise TimeoutError(f"no event within {timeout} s\n{self.log}")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                raise EOFError(self.log)
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        event = json.loads(line)
        assert isinstance(event, dict)
        return event

    def events_for(self, seconds: float) -> int:
        """How many come in this time."""
        deadline = Deadline(seconds)
        count = 0
        while not deadline.expired:
            try:
                self.event(deadline.remaining())
            except TimeoutError:
                break
            count += 1
        return count

    def drain(self) -> None:
        """Forgets what it has said. It stands still: there is no more than that."""
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], 0)[0]:
            if not os.read(self.process.stdout.fileno(), 65536):
                break
        self._buffer = b""

    @property
    def state(self) -> str:
        """As the kernel has it: R, S, T, Z."""
        return state_of(self.pid)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait(self, timeout: float = 60.0) -> int:
        return self.process.wait(timeout)


TICKING = """
n = 0
while True:
    n += 1
    say(tick=n)
    time.sleep(0.01)
"""


@contextmanager
def child(folder: Path, code: str, under: Sequence[str] = ()) -> Iterator[Child]:
    log = folder / f"child-{time.monotonic_ns()}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*under, sys.executable, "-c", _PREAMBLE + textwrap.dedent(code)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        yield Child(process, log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
