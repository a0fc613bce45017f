"""Each scenario file of ``tests/core/scenarios`` still gets the answers written in it (see ``scenario.py``).

``pytest tests/core --regenerate`` rewrites the answers; the diff is then the change of behaviour to review.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.scenario import rerun

SCENARIOS = sorted(Path(__file__).with_name("scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario_gets_the_answers_written_in_it(path: Path, request: pytest.FixtureRequest) -> None:
    now = rerun(path.read_text())
    if request.config.getoption("--regenerate"):
        path.write_text(now)
    assert now == path.read_text()


def test_wrong_answer_is_noticed() -> None:
    right = rerun("options min_replicas=1\nrequest a step=3\n----\n")
    assert "quorum 1: a=3" in right
    assert rerun(right) == right
    assert rerun(right.replace("a=3", "a=4")) == right


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 15
