"""A real etcd on loopback (Debian: ``apt-get install etcd-server``), and lighthouses that stand by as processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.etcd import PROGRAM, Etcd, running_etcd
from torchft.testing.wait import wait_until

__all__ = ["Etcd", "LighthouseProcess", "needs_etcd", "running_etcd"]

needs_etcd = pytest.mark.skipif(PROGRAM is None, reason="needs etcd on the PATH (Debian: apt-get install etcd-server)")


class LighthouseProcess:
    """``torchft lighthouse --ha`` in a process of its own."""

    def __init__(self, ha: str, lease_ms: int, *options: str, bind: str = "127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "torchft.cli.lighthouse", "--min_replicas", "1", "--bind", bind, *options]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*command, "--ha", ha, "--ha_lease_ms", str(lease_ms)], stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.said("export TORCHFT_LIGHTHOUSE="), what="that it listens")
        told = next(line for line in list(self.lines) if "export TORCHFT_LIGHTHOUSE=" in line)
        self.address = told.rpartition("=")[2].strip(") \n")

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def said(self, text: str) -> bool:
        return any(text in line for line in list(self.lines))

    def epochs(self) -> list[int]:
        return [int(line.rpartition("epoch ")[2]) for line in list(self.lines) if "leads from now on" in line]

    def stop(self) -> float:
        """SIGSTOP. Returns the wall-clock time before it."""
        at = time.time()
        self.process.send_signal(signal.SIGSTOP)
        return at

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
