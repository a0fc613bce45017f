from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.job import Job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


@pytest.fixture(autouse=True)
def log_of_the_lighthouse(caplog: pytest.LogCaptureFixture) -> None:
    """It runs in this process; a test that fails shows what it said, also at INFO."""
    caplog.set_level(logging.INFO, "torchft")
