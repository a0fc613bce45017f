"""An operator has the last quorum forgotten and is wrong: its members live, cut off (decision 16)."""

from __future__ import annotations

from typing import Any

import pytest

from torchft.core.membership import Options, Quorum
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.testing.simulation import Parts, run_seed
from torchft.testing.simulation.invariants import Invariants

STORIES = ["all replaced", "lighthouse crashed", "cut off"]
SEEDS = range(250)


class ForgetsThem(StandingLighthouse):
    """At each start an operator says that the members of the last quorum are gone, whether they are or not."""

    def __init__(self, options: Options, quorum_id: int, now: float, *, last: Quorum | None, **kwargs: Any) -> None:
        super().__init__(options, quorum_id, now, last=last, **kwargs)
        for replica_id in () if last is None else last.replica_ids:
            self.failed(replica_id, "an operator says that it is gone", now)


def test_two_histories_for_a_while_are_all_that_a_wrong_word_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(lighthouse=ForgetsThem)
    broken = {seed: v.invariant for seed in SEEDS if (v := run_seed(seed, (2, 4), STORIES, parts).violation)}
    assert set(broken.values()) == {2}, broken

    def follows(*_: Any) -> None:
        """Two quorums may go on at a time."""

    monkeypatch.setattr(Invariants, "_follows", follows)
    after = [str(v) for seed in SEEDS if (v := run_seed(seed, (2, 4), STORIES, parts).violation)]
    assert after == [], "when all see each other again there is one job, with one state"
