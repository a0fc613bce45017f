"""Log lines say who speaks and at which step."""

from __future__ import annotations

import logging

import pytest

from torchft.runtime.logs import RankLogger, SpeakerLogger, speaking


def test_line_begins_with_replica_rank_and_the_step_of_now(caplog: pytest.LogCaptureFixture) -> None:
    step = 4
    log = RankLogger(logging.getLogger("torchft.test"), "replica_0:abc", 1, lambda: step)
    with caplog.at_level(logging.INFO, logger="torchft.test"):
        log.info("took %d ms", 12)
        step = 5
        log.warning("slow")
    assert caplog.messages == ["[replica_0:abc/1 - step 4] took 12 ms", "[replica_0:abc/1 - step 5] slow"]


def test_shared_code_speaks_for_the_rank_that_calls_it(caplog: pytest.LogCaptureFixture) -> None:
    rank = RankLogger(logging.getLogger("torchft.test"), "replica_0:abc", 1, lambda: 4)
    log = SpeakerLogger("torchft.test")
    with caplog.at_level(logging.INFO, logger="torchft.test"):
        with speaking(rank):
            log.info("took %d ms", 12)
        log.info("nobody")
    assert caplog.messages == ["[replica_0:abc/1 - step 4] took 12 ms", "nobody"]
