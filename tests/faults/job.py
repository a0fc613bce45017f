"""A job of several trainer processes on this machine, for tests that kill them."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from torch.distributed import TCPStore

from tests.forked import ForkedProgram
from torchft.coordination import LighthouseServer
from torchft.runtime.deadline import Deadline

TRAINER = Path(__file__).with_name("trainer.py")


class Trainer:
    """One trainer process and the events it has printed.

    Args:
        program: how it is started.
    """

    def __init__(
        self,
        job: Job,
        name: str,
        *args: str,
        program: type[ForkedProgram] | type[Popen[str]] = ForkedProgram,
        **environment: str,
    ) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self.exits: set[int | None] = {None, 0, -signal.SIGKILL}
        """How it may end without the test failing."""
        self._changed = job.changed
        self._log = (job.folder / f"{name}-{len(job.trainers)}.log").open("w+")
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("TORCHFT_") and k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        }
        own = {"TORCHFT_LIGHTHOUSE": job.addresses, "OMP_NUM_THREADS": "1"}
        self.process = program(
            [sys.executable, str(job.trainer), "--name", name, "--stop-file", str(job.stop_file), *args],
            stdout=PIPE,
            stderr=self._log,
            text=True,
            env=inherited | own | job.environment | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        self.process.wait()
        with self._changed:
            self._changed.notify_all()

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    @property
    def step(self) -> int:
        steps = self.of("step")
        return int(steps[-1]["step"]) if steps else 0

    def seconds_per_step(self) -> float:
        """Of its last steps."""
        times = [e["time"] for e in self.of("step")[-20:]]
        return max(1e-3, (times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else 1.0

    @property
    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    @property
    def newest(self) -> dict[str, Any]:
        """Its last step."""
        steps = self.of("step")
        return steps[-1] if steps else {"step": 0, "participants": 0, "time": 0.0}

    def commits_after(self, time: float) -> list[dict[str, Any]]:
        return [e for e in self.of("step") if e["committed"] and e["time"] > time]

    def failures(self) -> list[str]:
        """The errors of its steps."""
        return [e["error"] for e in self.of("step") if e["error"]]

    def signal(self, number: signal.Signals) -> float:
        """Sends it. Returns when, on the clock of the events."""
        at = time.time()
        self.process.send_signal(number)
        return at

    def stacks(self) -> str:
        """Where its threads are, innermost call first; empty if it has ended, is stopped, or does not answer."""
        before = len(self.log)
        self.process.send_signal(signal.SIGUSR1)
        deadline = Deadline(5.0)
        while "most recent call first" not in self.log[before:] and not deadline.expired:
            time.sleep(0.05)  # only where a test has failed
        time.sleep(0.2)
        return self.log[before:]

    def kill(self) -> float:
        at = self.signal(signal.SIGKILL)
        self.process.wait(timeout=30)
        return at

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for forked in self.of("forked"):
            try:
                os.kill(forked["pid"], signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._reader.join(timeout=30)
        self._log.close()


class Job:
    """A lighthouse and trainers. ``close`` ends every one of them.

    Args:
        folder: for logs.
        addresses: of lighthouses that are somebody else's; the one here stands idle then.
        trainer: what each of them runs.
        **lighthouse: options of the one here.
    """

    def __init__(
        self, folder: Path, addresses: str | None = None, *, trainer: Path = TRAINER, **lighthouse: int
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.stop_file = folder / "stop-at"
        self.changed = threading.Condition()
        self.environment: dict[str, str] = {}
        self.lighthouse = LighthouseServer(
            "127.0.0.1:0", **{"min_replicas": 1, "join_timeout_ms": 100, "heartbeat_timeout_ms": 1000, **lighthouse}
        )
        self.addresses = addresses or self.lighthouse.address()
        self.trainers: list[Trainer] = []
        self._stores: list[TCPStore] = []

    def start(self, name: str, *args: str, **options: Any) -> Trainer:
        trainer = Trainer(self, name, *args, **options)
        self.trainers.append(trainer)
        return trainer

    def start_group(self, name: str, ranks: int, *args: str) -> list[Trainer]:
        """A group of several ranks, with its store in this process."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stores.append(store)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
        where["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it is not rank 0 that hosts it
        return [self.start(name, *args, RANK=str(rank), **where) for rank in range(ranks)]

    def until(self, condition: Callable[[], object], what: str, timeout: float = 120.0) -> None:
        """Waits for the trainers' events to make ``condition`` true.

        Raises:
            AssertionError: they did not in time; the message has the end of every trainer's log.
        """
        deadline = Deadline(timeout)
        with self.changed:
            while not condition():
                crashed = [t.name for t in self.trainers if t.process.poll() not in t.exits]
                if deadline.expired or crashed:
                    logs = "\n".join(f"--- {t.name} at {t.step}\n{t.log[-3000:]}\n{t.stacks()}" for t in self.trainers)
                    cause = f"{crashed} crashed" if crashed else f"within {timeout:g} s"
                    raise AssertionError(f"{what} did not happen: {cause}\n{logs}")
                self.changed.wait(min(0.5, deadline.remaining()))

    def finish(self, timeout: float = 120.0) -> list[dict[str, Any]]:
        """Lets the living trainers end at one step, and returns their last events.

        They come to it in most of a second: none may be beyond it when it is told, or they end at different ones.
        """
        living = [t for t in self.trainers if t.process.poll() is None]
        foremost = max(living, key=lambda t: t.step)
        target = foremost.step + max(10, math.ceil(0.7 / foremost.seconds_per_step()))
        partial = self.stop_file.with_suffix(".partial")
        partial.write_text(str(target))
        partial.rename(self.stop_file)
        self.until(lambda: all(t.of("end") or t.process.poll() is not None for t in living), "the end", timeout)
        ends = [t.of("end") for t in living]
        assert all(ends), "\n".join(f"--- {t.name}\n{t.log[-3000:]}" for t in living)
        return [e[0] for e in ends]

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.end()
        self.lighthouse.shutdown()
