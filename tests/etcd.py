"""A real etcd on loopback (Debian: ``apt-get install etcd-server``), and lighthouses that elect their leader there."""

from __future__ import annotations

import pytest

from benchmarks.etcd import PROGRAM, Etcd, running_etcd
from tests.lighthouse import LighthouseProcess

__all__ = ["Etcd", "needs_etcd", "running_etcd", "standby"]

needs_etcd = pytest.mark.skipif(PROGRAM is None, reason="needs etcd on the PATH (Debian: apt-get install etcd-server)")


def standby(ha: str, lease_ms: int, *options: str, former: LighthouseProcess | None = None) -> LighthouseProcess:
    """One of several lighthouses: ``torchft lighthouse --ha``."""
    return LighthouseProcess("--ha", ha, "--ha_lease_ms", str(lease_ms), *options, former=former)
