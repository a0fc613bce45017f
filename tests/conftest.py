"""What all tests share: the options of pytest, and how Hypothesis runs.

Hypothesis draws the same examples in each run, so a red build is never a matter of luck; ``HYPOTHESIS_PROFILE=search``
looks for new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.groups import Groups

settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=5000, stateful_step_count=80)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="rewrite the expected output of the scenario files (tests/core/scenarios) with what happens now",
    )


@pytest.fixture
def groups() -> Iterator[Groups]:
    """Replica groups in threads, and their lighthouse."""
    from tests.groups import running  # not above: it imports torch, which many tests do without

    with running() as g:
        yield g


@pytest.fixture
def pair() -> Iterator[Groups]:
    """The same, with a lighthouse that waits for two groups."""
    from tests.groups import running

    with running(min_replicas=2) as g:
        yield g
