"""The last replica that holds the state dies: the job does not silently begin again at step 0."""

from __future__ import annotations

import pytest

from tests.faults.job import Job


@pytest.mark.parametrize(
    ("transport", "phase"),
    [("http", "send"), ("pg", "send"), ("default", "half")],
    ids=["first-weights", "none-of-a-state", "half-a-state"],
)
def test_a_survivor_of_the_last_holder_stops_and_says_what_is_lost(job: Job, transport: str, phase: str) -> None:
    options = ("--transport", transport, "--state-mb", "64" if phase == "half" else "0")
    holder = job.start("holder", *options, "--die", f"{phase}@20")
    job.until(lambda: holder.step >= 20, "training alone")
    joiner = job.start("joiner", *options)
    joiner.exits = {None, 1}
    job.until(lambda: joiner.process.poll() is not None, "the end of who cannot go on")
    assert holder.of("dies"), "it died when it was to send its state"
    assert joiner.process.returncode == 1
    assert not [e for e in joiner.of("step") if e["committed"]], "nothing was trained from step 0"
    lost = joiner.log.rpartition("StateLost: ")[2]
    assert f"the job was at step {holder.of('dies')[0]['step']}" in lost
    assert f"held by {holder.of('start')[0]['replica_id']}" in lost
    assert "TORCHFT_ALLOW_RESTART=1" in lost or transport != "http"
