"""A real etcd on loopback (Debian: ``apt-get install etcd-server``), and lighthouses that stand by as processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from torchft.testing.wait import wait_until

__all__ = ["Etcd", "LighthouseProcess", "needs_etcd", "running_etcd"]

_PROGRAM = shutil.which("etcd")

needs_etcd = pytest.mark.skipif(_PROGRAM is None, reason="needs etcd on the PATH (Debian: apt-get install etcd-server)")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


class Etcd:
    """One etcd that can be killed and started again on the same port, with its data or without."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port, self._peer_port = _free_port(), _free_port()
        self._lives = 0
        self.process = self._start()

    def url(self, job: str, port: int | None = None) -> str:
        return f"etcd://127.0.0.1:{port or self.port}/{job}"

    def _start(self) -> subprocess.Popen[bytes]:
        client, peer = (f"http://127.0.0.1:{p}" for p in (self.port, self._peer_port))
        with open(self._folder / "etcd.log", "ab") as log:
            process = subprocess.Popen(
                [
                    *(str(_PROGRAM), "--name", "one", "--data-dir", str(self._folder / f"data{self._lives}")),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"one={peer}"),
                    *("--heartbeat-interval", "10", "--election-timeout", "100"),  # leases of one second
                ],
                stderr=log,
                stdout=log,
            )
        try:
            wait_until(self._healthy, what="etcd's health")
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, ValueError):
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def start_again(self, with_data: bool = True) -> None:
        """After :meth:`kill`."""
        self._lives += not with_data
        self.process = self._start()

    def put(self, key: str, value: str) -> None:
        """With the tool that comes with etcd's protocol: JSON over HTTP."""
        from etcd3gw import Etcd3Client

        Etcd3Client("127.0.0.1", self.port, api_path="/v3/", timeout=5).put(key, value)


@contextmanager
def running_etcd(folder: Path) -> Iterator[Etcd]:
    etcd = Etcd(folder)
    try:
        yield etcd
    finally:
        etcd.kill()


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
        self.address = self.lines[-1].rpartition("=")[2].strip(") \n")

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
