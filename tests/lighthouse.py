"""A lighthouse in a process of its own, as the command starts it: to be killed, stopped and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

from torchft.testing.ports import ReservedPort
from torchft.testing.wait import wait_until

__all__ = ["LighthouseProcess"]


class LighthouseProcess:
    """``torchft lighthouse``, and what it has logged.

    Args:
        *options: of the command.
        former: whose address it takes; that one has ended.
    """

    def __init__(self, *options: str, former: LighthouseProcess | None = None) -> None:
        self._reserved = ReservedPort() if former is None else former._reserved
        bind = f"127.0.0.1:{self._reserved.port}"
        command = [sys.executable, "-m", "torchft.cli.lighthouse", "--min_replicas", "1", "--bind", bind]
        if not {"--state_file", "--ha"} & {*options}:
            command += ["--state_file", "none"]
        self.lines: list[str] = []
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self._listens() or self._ended(), timeout=60, what="that it listens")
        told = next((line for line in list(self.lines) if "export TORCHFT_LIGHTHOUSE=" in line), "")
        if not told:
            self.end()
            raise RuntimeError(f"the lighthouse did not start:\n{''.join(self.lines)}")
        self.address = told.rpartition("=")[2].strip(") \n")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def _listens(self) -> bool:
        return self.said("export TORCHFT_LIGHTHOUSE=")

    def _ended(self) -> bool:
        return self.process.poll() is not None

    def said(self, text: str) -> bool:
        return any(text in line for line in list(self.lines))

    def epochs(self) -> list[int]:
        """Those in which it has begun to lead, with ``--ha``."""
        return [int(line.rpartition("epoch ")[2]) for line in list(self.lines) if "leads from now on" in line]

    def quorums(self) -> list[tuple[int, int]]:
        """Id and size of each quorum that differed from the one before it."""
        told = [line.partition(" - quorum ")[2].split() for line in list(self.lines) if " - quorum " in line]
        return [(int(words[0]), int(words[2])) for words in told]  # "quorum 3 of 2 replicas at step 5: …"

    def stop(self) -> float:
        """SIGSTOP. Returns the wall-clock time before it."""
        at = time.time()
        self.process.send_signal(signal.SIGSTOP)
        return at

    def kill(self) -> float:
        """SIGKILL, and waits for its end. Returns the wall-clock time after it."""
        self.process.kill()
        self.process.wait()
        return time.time()

    def end(self) -> None:
        """Whatever state it is in. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._reserved.close()
