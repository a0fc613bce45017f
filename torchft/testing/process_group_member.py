"""One member of a process group in a process of its own, told what to do line by line.

:class:`Member` is the test's end; ``python -m torchft.testing.process_group_member`` is the other. Commands and
answers are lines of JSON, so that a member can be stopped, killed and asked again at any point.
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
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from torchft.process_group import ProcessGroup
from torchft.process_group.rendezvous import RendezvousStore
from torchft.testing.wait import wait_until

__all__ = ["Member"]


class Member:
    """A member process. Use as a context manager: it is killed at the end.

    Args:
        factory: ``module:Class`` of the group, called with ``timeout``.
        timeout: of the group, seconds.
        env: added to the environment.
    """

    def __init__(self, factory: str, timeout: float = 30.0, env: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchft.testing.process_group_member", factory, str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))

    def tell(self, command: str, **arguments: Any) -> None:
        """Sends a command without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self, deadline: float = 60.0) -> dict[str, Any]:
        """The next answer: ``{"value": …, "error": … or None, "seconds": …}``.

        Raises:
            TimeoutError: none came within ``deadline`` seconds.
        """
        try:
            return self._answers.get(timeout=deadline)
        except queue.Empty:
            raise TimeoutError(f"no answer of member {self._process.pid} within {deadline:g} s") from None

    def ask(self, command: str, deadline: float = 60.0, **arguments: Any) -> dict[str, Any]:
        """:meth:`tell` and :meth:`answer`."""
        self.tell(command, **arguments)
        return self.answer(deadline)

    def stop(self) -> None:
        """The process stands still (SIGSTOP), its connections stay open."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def wait_until_stopped(self, deadline: float = 60.0) -> None:
        """Until the process stands still.

        Raises:
            TimeoutError: it did not within ``deadline`` seconds.
        """
        wait_until(
            lambda: os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT),
            deadline,
            f"the stop of member {self._process.pid}",
        )

    def kill(self) -> None:
        """The process dies at once."""
        self._process.kill()
        self._process.wait(timeout=30)

    def wait(self, deadline: float = 60.0) -> int:
        """The exit code of a member that ends by itself."""
        return self._process.wait(timeout=deadline)

    def __enter__(self) -> Member:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._reader.join(timeout=30)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # a command that the killed process never read


class _Loop:
    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def configure(self, store_addr: str, rank: int, world_size: int) -> None:
        self._group.configure(store_addr, f"member{rank}", rank, world_size)

    def configure_and_stop(self, store_addr: str, rank: int, world_size: int) -> None:
        """Tells the others where it is, and stands still at once."""

        def set_and_stop(store: RendezvousStore, key: str, value: bytes | str) -> None:
            plain(store, key, value)
            os.kill(os.getpid(), signal.SIGSTOP)

        plain = RendezvousStore.set
        RendezvousStore.set = set_and_stop  # type: ignore[method-assign, assignment]
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

    def errored(self) -> str | None:
        error = self._group.errored()
        return None if error is None else str(error)


def _main(factory: str, timeout: str) -> None:
    module, _, name = factory.partition(":")
    torch.set_num_threads(1)
    group: ProcessGroup = getattr(importlib.import_module(module), name)(timeout=timedelta(seconds=float(timeout)))
    loop = _Loop(group)
    for line in sys.stdin:
        arguments = json.loads(line)
        command = arguments.pop("command")
        begun = time.monotonic()
        value, error = None, None
        try:
            value = getattr(loop, command)(**arguments)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        print(json.dumps({"value": value, "error": error, "seconds": time.monotonic() - begun}), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
