"""What the tests of lighthouses and of those who ask them share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.coordination.standbys import Lights
from tests.etcd import Etcd, running_etcd


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """For tests that leave it as it is."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def lights() -> Iterator[Lights]:
    lights = Lights()
    yield lights
    for server in list(lights.servers):
        lights.end(server)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor
