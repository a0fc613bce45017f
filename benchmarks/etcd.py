"""A real etcd on loopback, as a child process: Debian's package ``etcd-server`` has the program."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchft.testing.ports import ReservedPort
from torchft.testing.wait import wait_until

__all__ = ["PROGRAM", "Etcd", "running_etcd"]

PROGRAM = shutil.which("etcd")
"""None: there is none on this machine."""


class Etcd:
    """One etcd that can be killed and started again on the same port, with its data or without."""

    def __init__(self, folder: Path) -> None:
        if PROGRAM is None:
            raise RuntimeError("there is no etcd on this machine (Debian: apt-get install etcd-server)")
        self._folder = folder
        # In memory where that is possible: on a disk that others keep busy, each of its syncs takes seconds.
        self._data = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else folder)
        self._reserved = [ReservedPort(), ReservedPort()]
        self.port, self._peer_port = (reserved.port for reserved in self._reserved)
        self._lives = 0
        self.process = self._start()

    def url(self, job: str, port: int | None = None) -> str:
        return f"etcd://127.0.0.1:{port or self.port}/{job}"

    def _start(self) -> subprocess.Popen[bytes]:
        client, peer = (f"http://127.0.0.1:{p}" for p in (self.port, self._peer_port))
        with open(self._folder / "etcd.log", "ab") as log:
            process = subprocess.Popen(
                [
                    *(PROGRAM, "--name", "one", "--data-dir", f"{self._data.name}/data{self._lives}"),
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

    def close(self) -> None:
        """Ends it for good."""
        self.kill()
        self._data.cleanup()
        for reserved in self._reserved:
            reserved.close()

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
        etcd.close()
