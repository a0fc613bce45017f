"""A process that waits in vain for another rank of its own group ends, and no other."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.groups import Groups
from torchft.coordination.types import ANY_QUORUM, Notice
from torchft.group_loss import EXIT_CODE, GroupLoss
from torchft.runtime.logs import RankLogger

GRACE = 0.05
DEADLINE = 60.0
LOST = Notice("g:1", "rank 1 of this group is no longer there: its process has ended", ANY_QUORUM)

LEFT = Notice("g:1", "rank 1 of this group left: done", ANY_QUORUM, step=4)


class Watched:
    """A process that notes that it would end."""

    def __init__(self, grace: float = GRACE) -> None:
        self.in_step = True
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.looked = queue.SimpleQueue[bool]()
        log = RankLogger(logging.getLogger(__name__), "g:1", 0, lambda: 3)
        self.loss = GroupLoss("g:1", grace, self._look, log, self.ends.put)

    def _look(self) -> bool:
        self.looked.put(self.in_step)
        return self.in_step


def test_in_the_middle_of_a_step_it_ends_after_the_grace() -> None:
    watched = Watched()
    watched.loss.hear(LOST)
    assert "rank 1" in watched.ends.get(timeout=DEADLINE)


@pytest.mark.parametrize(
    "notice",
    [
        Notice("other:1", "its process has ended", ANY_QUORUM),
        Notice("g:1", "its rank 1 is no longer there", 7),  # the lighthouse's word about the whole group
        Notice("g:1", "could not finish its step", ANY_QUORUM, lives=True),
    ],
)
def test_news_that_are_not_of_a_rank_of_its_own_group_end_nothing(notice: Notice) -> None:
    watched = Watched(grace=0.0)
    watched.loss.hear(notice)
    with pytest.raises(queue.Empty):
        watched.ends.get(timeout=0.1)


def test_between_two_steps_it_waits_for_nobody_and_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchft.group_loss._AGAIN", 0.01)
    watched = Watched()
    watched.in_step = False
    watched.loss.hear(LOST)
    assert [watched.looked.get(timeout=DEADLINE) for _ in range(3)] == [False] * 3
    assert watched.ends.empty()
    watched.in_step = True
    assert watched.ends.get(timeout=DEADLINE)


@pytest.mark.parametrize(
    ("notice", "in_step", "level"),
    [
        (LOST, True, logging.ERROR),
        (LOST, False, logging.ERROR),
        (LEFT, True, logging.ERROR),  # by an exception, say
        (LEFT, False, logging.INFO),
    ],
)
def test_a_loss_is_an_error_in_the_log_unless_a_rank_left_between_two_steps(
    notice: Notice, in_step: bool, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watched = Watched(grace=600.0)
    watched.in_step = in_step
    watched.loss.hear(notice)
    watched.loss.hear(LOST)  # the connection of who has left ends as well: that is no second loss
    watched.loss.stop()
    assert [record.levelno for record in caplog.records if "rank 1" in record.getMessage()] == [level]


@pytest.mark.parametrize(
    "call_off",
    [lambda loss: loss.whole(time.monotonic()), lambda loss: loss.back(LOST), GroupLoss.stop],
    ids=["whole", "back", "stop"],
)
def test_a_whole_group_or_an_orderly_end_calls_it_off_and_a_new_loss_counts_again(
    call_off: Callable[[GroupLoss], None],
) -> None:
    watched = Watched(grace=0.5)  # long enough to call it off in time
    watched.loss.hear(LOST)
    call_off(watched.loss)
    with pytest.raises(queue.Empty):
        watched.ends.get(timeout=0.8)
    watched.loss.hear(LOST)
    assert watched.ends.get(timeout=DEADLINE)


def test_a_rank_that_is_lost_after_its_vote_is_lost() -> None:
    watched = Watched()
    voted = time.monotonic()
    watched.loss.hear(LOST)  # before the answer to that vote has come
    watched.loss.whole(voted - 0.001)
    assert watched.ends.get(timeout=DEADLINE)


def test_the_return_of_one_rank_does_not_make_up_for_another() -> None:
    watched = Watched()
    watched.loss.hear(LOST)
    silent = Notice("g:1", "rank 0 of this group is no longer there: no sign of life for 5.6 s", ANY_QUORUM)
    watched.loss.hear(silent)
    watched.loss.back(silent)
    assert "rank 1" in watched.ends.get(timeout=DEADLINE)


def test_the_process_ends_with_the_stacks_of_its_threads() -> None:
    code = """
import threading
from torchft.group_loss import end_process
def waits_in_a_collective():
    ready.set()
    threading.Event().wait()
ready = threading.Event()
threading.Thread(target=waits_in_a_collective).start()
ready.wait()
end_process("rank 1 is gone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_CODE
    assert "waits_in_a_collective" in done.stderr


def test_a_loss_while_the_model_was_made_counts(groups: Groups) -> None:
    manager = groups.replica("g").manager
    manager._hear(Notice(manager.replica_id(), LOST.cause, ANY_QUORUM))
    manager.end_with_group()
    assert manager._loss is not None
    assert manager._loss._notice is not None
    assert manager._loss._notice.cause == LOST.cause
