"""Child processes for benchmarks and interoperation tests: the same script run with either implementation.

The idea: a child is a Python script written against the public API only. Which `torchft` it imports is decided by
PYTHONPATH alone, so what is compared differs in nothing else. A child speaks JSON, one object a line, on its standard
output; each object has an `event` and, as `t`, the seconds of the machine-wide monotonic clock, so that times of
different processes can be subtracted.

Rules:

- Each child has one owner, a `Cluster`, which ends all of its children by process id when it is left.
- Every wait has a deadline and ends early when the awaited child dies. The error then carries the end of its stderr.
- A child's first event is `hello` and names the file `torchft` came from; one of the wrong implementation is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = [
    "CHILDREN",
    "IMPLEMENTATIONS",
    "OURS",
    "PEER",
    "Child",
    "ChildError",
    "ChildTooSlowError",
    "Cluster",
    "Event",
    "Implementation",
]

ROOT = Path(__file__).resolve().parent.parent
CHILDREN = Path(__file__).resolve().parent / "children"

Event = dict[str, Any]


class ChildError(RuntimeError):
    """A child died, took too long or is not what it should be. The message ends with what it last wrote."""


class ChildTooSlowError(ChildError):
    """A child that lives did not say in time what was waited for."""


@dataclass(frozen=True)
class Implementation:
    """A `torchft` to run: its name, and the folder that goes to the front of PYTHONPATH."""

    name: str
    path: Path
    commands: Path
    """The folder of its command line tools."""

    def environment(self) -> dict[str, str]:
        """The environment of a child: the caller's, without its torchft settings."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHFT_")}
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "REPLICA_GROUP_ID"):
            env.pop(name, None)
        return env | {
            "PYTHONPATH": os.pathsep.join((str(self.path), str(CHILDREN))),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


OURS = Implementation("ours", ROOT, Path(sys.executable).parent)
PEER = Implementation("peer", ROOT / ".peer", ROOT / ".peer" / "bin")
IMPLEMENTATIONS = {i.name: i for i in (OURS, PEER)}


class Child:
    """One running child and what it has said so far."""

    def __init__(self, name: str, impl: Implementation, argv: Sequence[str], logs: Path, env: dict[str, str]) -> None:
        self.name = name
        self.spawned = time.monotonic()
        self._impl = impl
        self._log = logs / f"{name}.stderr"
        self._said = threading.Condition()
        self._events: list[Event] = []
        self._closed = False
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=impl.environment() | env,
                cwd=logs,  # not the checkout, which holds a torchft of its own
            )
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library's own chatter on stdout
            if isinstance(event, dict) and "event" in event:
                with self._said:
                    self._events.append(event)
                    self._said.notify_all()
        with self._said:
            self._closed = True
            self._said.notify_all()

    @property
    def events(self) -> list[Event]:
        """A copy of everything said so far."""
        with self._said:
            return list(self._events)

    def all(self, event: str) -> list[Event]:
        return [e for e in self.events if e["event"] == event]

    def wait(self, event: str, timeout: float, where: Callable[[Event], bool] = lambda e: True) -> Event:
        """The first event of that name for which ``where`` holds, waiting up to ``timeout`` seconds for it.

        Raises:
            ChildTooSlowError: the time passed without it.
            ChildError: the child ended without saying so.
        """
        end = time.monotonic() + timeout
        seen = 0
        with self._said:
            while True:
                for e in self._events[seen:]:
                    if e["event"] == event and where(e):
                        return e
                seen = len(self._events)
                if self._closed:
                    raise self.error(f"ended before it said {event!r}")
                left = end - time.monotonic()
                if left <= 0:
                    raise ChildTooSlowError(self._described(f"did not say {event!r} within {timeout:g} s"))
                self._said.wait(left)

    def hello(self, timeout: float = 90.0) -> Event:
        """Waits until the child has imported torchft, and checks which one."""
        said = self.wait("hello", timeout)
        if not str(said["torchft"]).startswith(f"{self._impl.path}{os.sep}torchft{os.sep}"):
            raise self.error(f"should run {self._impl.name}, but its torchft is {said['torchft']}")
        return said

    def tell(self, word: str) -> None:
        """Writes one line to the child's standard input. One that has died does not hear it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(word.encode() + b"\n")
            self._process.stdin.flush()

    def kill(self) -> float:
        """SIGKILL, now. Returns the monotonic time just before it."""
        at = time.monotonic()
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        return at

    def pause(self) -> float:
        """SIGSTOP, now. Returns the monotonic time just before it. `close` ends a stopped child as any other."""
        at = time.monotonic()
        self._process.send_signal(signal.SIGSTOP)
        return at

    def resume(self) -> float:
        """SIGCONT, now. Returns the monotonic time just after it."""
        self._process.send_signal(signal.SIGCONT)
        return time.monotonic()

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self, timeout: float = 60.0) -> int:
        """Waits for the child to end by itself and returns its exit code."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"did not end within {timeout:g} s") from None
        self._reader.join(10)
        return code

    def stderr(self, last: int = 3000) -> str:
        return self._log.read_bytes()[-last:].decode(errors="replace")

    def error(self, what: str) -> ChildError:
        return ChildError(self._described(what))

    def _described(self, what: str) -> str:
        code = self._process.poll()
        state = "running" if code is None else f"exit code {code}"
        return f"{self.name} ({self._impl.name}, {state}) {what}; its stderr ends:\n{self.stderr()}"

    def close(self) -> None:
        """Ends the child whatever it does, and gives back its pipes."""
        if self.alive():
            self.kill()
        self._reader.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Cluster:
    """The children of one run; leaving it ends them all. A context manager."""

    def __init__(self) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="torchft-run-")
        self._children: list[Child] = []

    @property
    def folder(self) -> Path:
        """A folder that lives as long as the cluster."""
        return Path(self._dir.name)

    def spawn(
        self,
        impl: Implementation,
        script: Path,
        *args: object,
        name: str | None = None,
        env: dict[str, str] | None = None,
    ) -> Child:
        """Starts ``script`` with ``impl``. Does not wait for it: see `Child.hello`."""
        name = f"{len(self._children):02d}-{name or script.stem}"
        child = Child(name, impl, [str(script), *map(str, args)], self.folder, env or {})
        self._children.append(child)
        return child

    def lighthouse(
        self,
        impl: Implementation,
        min_replicas: int = 1,
        join_timeout_ms: int = 60_000,
        heartbeat_timeout_ms: int = 5_000,
    ) -> str:
        """Starts a lighthouse, with the defaults of its command line, and returns its address."""
        child = self.spawn(impl, CHILDREN / "lighthouse.py", min_replicas, join_timeout_ms, heartbeat_timeout_ms)
        child.hello()
        return str(child.wait("address", 30)["address"])

    def lighthouse_command(self, impl: Implementation, *args: object) -> str:
        """Starts `torchft_lighthouse --min_replicas 1` as a user does, with its own defaults; returns its address."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = (impl.commands / "torchft_lighthouse", "--min_replicas", 1, "--bind", f"[::]:{port}", *args)
        # Ours keeps a state file; not in the folder of whoever measures.
        own = {"TORCHFT_STATE_DIR": str(self.folder)}
        child = self.spawn(impl, CHILDREN / "orphan.py", *command, name="torchft_lighthouse", env=own)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return f"http://localhost:{port}"
            except OSError:
                if not child.alive() or time.monotonic() > deadline:
                    raise child.error(f"does not listen at port {port}") from None
                time.sleep(0.05)  # its socket is all there is to see

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.close()
        self._dir.cleanup()
