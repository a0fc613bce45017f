from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.job import Job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()
