"""Both implementations, as processes. The peer is installed on first use; without it these tests fail, not skip."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import Cluster

INSTALL = Path(__file__).resolve().parent.parent.parent / "scripts" / "install_peer.py"


@pytest.fixture(scope="session")
def _peer() -> None:
    subprocess.run([sys.executable, str(INSTALL)], check=True, timeout=300)


@pytest.fixture
def cluster(_peer: None) -> Iterator[Cluster]:
    """Owns the children of one test; they are gone after it."""
    with Cluster() as cluster:
        yield cluster
