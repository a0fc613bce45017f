"""What a group does about a state that nobody holds any more."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from torchft.coordination import QuorumResult
from torchft.lost_state import Holders, StateLost, check_not_lost
from torchft.runtime.logs import RankLogger

LOG = RankLogger(logging.getLogger(__name__), "b", 0, lambda: 0)


def check(allow_restart: bool | None = None, saved: int = 0, **quorum: Any) -> None:
    holders = Holders({"a": "its process has ended"}.get)
    before = {"quorum_id": 1, "max_step": 500, "replica_ids": ["a", "b"], "recovering_replica_ranks": [1]}
    holders.remember(QuorumResult(**before))  # type: ignore[arg-type]
    now = QuorumResult(**{"quorum_id": 2, "replica_ids": ["b", "c"], **quorum})
    check_not_lost(now, allow_restart, holders, lambda _: saved, LOG)


def test_a_survivor_does_not_begin_again_unless_it_may() -> None:
    lost = {"max_step": 0, "lost_step": 500, "lost_by_survivor": True}
    for allow_restart in (None, False):
        with pytest.raises(StateLost, match="the job was at step 500") as e:
            check(allow_restart, **lost)
        assert e.value.step == 500
        assert "it was held by a (its process has ended)" in str(e.value)
        assert "TORCHFT_ALLOW_RESTART=1" in str(e.value)
    check(True, **lost)


def test_new_groups_begin_and_are_told_what_was(caplog: pytest.LogCaptureFixture) -> None:
    former = {"max_step": 0, "lost_step": 500, "lost_by_survivor": False}
    check(None, **former)
    assert "the job begins again at step 0: it was at step 500" in caplog.text
    check(True, **former)
    with pytest.raises(StateLost):
        check(False, **former)


def test_half_a_state_is_not_begun_with_whatever_is_allowed() -> None:
    with pytest.raises(StateLost, match="hold half a state") as e:
        check(True, max_step=-1, lost_step=500, lost_by_survivor=True)
    assert "TORCHFT_ALLOW_RESTART" not in str(e.value)
    with pytest.raises(RuntimeError, match="They ask again") as again:
        check(None, max_step=-1)
    assert not isinstance(again.value, StateLost), "nothing that was trained is lost"


def test_members_that_hold_something_go_on_unless_a_checkpoint_is_newer() -> None:
    behind = {"max_step": 490, "lost_step": 500, "lost_by_survivor": True}
    check(None, **behind)
    check(None, saved=490, **behind)
    with pytest.raises(StateLost, match="behind the checkpoint of step 495"):
        check(None, saved=495, **behind)
    check(None, saved=495, max_step=490)  # nobody has seen more: it is somebody else's checkpoint


def test_who_held_the_state_is_said_only_if_it_is_known() -> None:
    assert str(Holders(lambda _: None)) == "who held it is not known here"
