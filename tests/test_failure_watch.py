"""Which notices break the quorum in use, and until when."""

from __future__ import annotations

import time

import pytest

from torchft.coordination.types import ANY_QUORUM, Notice
from torchft.failure_watch import FailureWatch

RANK = Notice("g:1", "rank 1 of this group is no longer there: no sign of life for 5.6 s", ANY_QUORUM)


class Watch(FailureWatch):
    """In step after step of a group and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Notice] = []

    def step(self, quorum_id: int) -> list[Notice]:
        """What the step is told as it begins."""
        self.told = []
        self.enter(["g:1", "other:1"], quorum_id, quorum_id, self.told.append)
        return self.told


@pytest.mark.parametrize("heard", ["before", "in", "between"])
def test_a_death_breaks_the_quorum_that_it_names_whichever_is_known_first(heard: str) -> None:
    watch = Watch()
    died = Notice("other:1", "its process has ended", 7)
    if heard == "before":
        watch.hear(died)
    told = watch.step(7)
    if heard == "between":
        watch.exit()
    if heard != "before":
        watch.hear(died)
    assert told == ([] if heard == "between" else [died])
    assert watch.step(8) == [], "it came back"


def test_a_lost_rank_of_this_group_breaks_each_step_until_it_is_seen_to_be_back() -> None:
    watch = Watch()
    told = watch.step(7)
    watch.hear(RANK)
    assert told == [RANK]
    assert watch.step(8) == [RANK]
    watch.back(Notice("g:1", "rank 2 of this group is no longer there", ANY_QUORUM))
    assert watch.step(9) == [RANK], "that was another one"
    watch.back(RANK)
    assert watch.step(10) == []


def test_a_vote_of_all_ranks_shows_that_the_group_is_whole_if_it_began_after_the_loss() -> None:
    watch = Watch()
    voted = time.monotonic()
    watch.hear(RANK)
    watch.whole(voted - 0.001)
    assert watch.step(8) == [RANK], "it died after its vote"
    watch.whole(time.monotonic())
    assert watch.step(9) == []


def test_a_vote_of_all_ranks_of_this_group_says_nothing_about_others() -> None:
    watch = Watch()
    died = Notice("other:1", "its process has ended", 9)
    watch.hear(died)
    watch.whole(time.monotonic())
    assert watch.step(9) == [died]
