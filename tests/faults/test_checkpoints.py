"""The whole job is killed: it goes on from its newest checkpoint that is whole."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.job import Job
from tests.testing.child import child
from tests.testing.test_faults_disk import PRIVATE, _can_mount
from torchft.checkpointing import Checkpoints, load_latest


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder in memory where there is one: a disk that others keep busy takes seconds to sync."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def test_all_groups_are_killed_and_one_alone_goes_on_from_the_newest_whole_checkpoint(job: Job, disk: Path) -> None:
    folder = disk / "checkpoints"
    checkpoints = Checkpoints(folder)
    a, b = (job.start(name, "--checkpoints", str(folder), "--every", "5") for name in "ab")
    job.until(lambda: len(checkpoints.candidates()) >= 2 and b.step and b.newest["participants"] == 2, "two of them")
    for trainer in (a, b):
        trainer.process.send_signal(signal.SIGKILL)  # both, before one notices that the other is gone
    for trainer in (a, b):
        trainer.process.wait(timeout=60)
    saves = [event["step"] for trainer in (a, b) for event in trainer.of("saves")]
    assert len(saves) == len(set(saves)) >= 2, "each step by one of the two groups"
    (newest, damaged), (before, whole) = checkpoints.candidates()[:2]
    data = damaged / "rank-0.data"
    os.truncate(data, data.stat().st_size // 2)

    # One group alone comes back, and finds the newest one damaged.
    c = job.start("c", "--checkpoints", str(folder), "--every", "5")
    job.until(lambda: c.of("step"), "a step")
    assert c.of("step")[0]["step"] == before + 1
    assert f"{damaged} is passed over for the one before: {data} has" in c.log
    assert f"restored step {before} from {whole}" in c.log
    job.until(lambda: c.step > newest, "what the others had reached")
    assert job.finish()[0]["step"] > newest
    assert checkpoints.candidates()[0][0] > before, "and they are saved again"
    loaded = load_latest(folder)
    assert loaded is not None
    assert loaded.state["torchft"]["step"] == loaded.step  # type: ignore[index]


@pytest.mark.parametrize("transport", ["http", "pg"], ids=["behind", "half-a-state"])
def test_a_survivor_of_the_last_holder_restores_the_newest_checkpoint(job: Job, disk: Path, transport: str) -> None:
    folder = disk / "checkpoints"
    options = ("--transport", transport, "--checkpoints", str(folder))
    holder = job.start("holder", *options, "--every", "1", "--step-seconds", "0.05", "--die", "send@3")
    job.until(lambda: holder.step >= 3, "checkpoints")
    survivor = job.start("survivor", *options, "--every", "1000000")

    def committed() -> list[int]:
        return [e["step"] for e in survivor.of("step") if e["committed"] and e["error"] is None]

    job.until(lambda: len(committed()) >= 3, "the survivor goes on alone")
    assert holder.of("dies"), "when it was to send its state"
    newest = Checkpoints(folder).candidates()[0][0]
    assert committed()[0] == newest + 1, "from the newest one, also if that was saved after it had started"
    if transport == "pg":  # it writes into the live state, which then is none
        assert f"the job was at step {holder.of('dies')[0]['step']}, and nobody holds that state" in survivor.log
        assert survivor.log.count("restored step") == 2


KILLED = """
import random, torch
from pathlib import Path
from torchft.checkpointing import Checkpoints, load_latest
folder = Path({folder!r})
subprocess_disk = {mount}
if subprocess_disk:
    import subprocess
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], check=True)
def state(step):
    return {{"w": torch.full((1 << 17,), float(step)), "v": [torch.full((1000,), float(step + i)) for i in range(50)]}}
torch.set_num_threads(1)
if subprocess_disk:
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, state(1)).result(60)
    with faults.fill_disk(str(folder)):
        error = checkpoints.save(2, state(2)).exception(60)
        say(full=error.errno, failures=checkpoints.failures, files=sorted(os.listdir(folder)))
    checkpoints.save(2, state(2)).result(60)
    say(after=[step for step, _ in checkpoints.candidates()])
    checkpoints.close()
    sys.stdout.flush()
    os._exit(0)  # what forks below has no threads
draw = random.Random(1)
first, ended = 0, 0
until = time.monotonic() + 60
life = 0
# On a slow machine it takes some more lives until enough was saved, and one was killed in the middle of it.
while life < 15 or (time.monotonic() < until and not (ended and first >= 5)):
    life += 1
    pid = os.fork()
    if pid == 0:
        checkpoints = Checkpoints(folder, keep=2)
        for step in range(first + 1, first + 1000):
            checkpoints.save(step, state(step)).result(60)
        os._exit(0)
    time.sleep(draw.uniform(0.02, 0.25))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    loaded = load_latest(folder)
    if loaded is None:
        continue
    whole = all(torch.equal(a, b) for a, b in zip([loaded.state["w"], *loaded.state["v"]],
        [state(loaded.step)["w"], *state(loaded.step)["v"]]))
    if not whole or loaded.step < first:
        say(life=life, loaded=loaded.step, before=first, whole=whole)
        sys.exit(1)
    ended += any(name.startswith(".writing-") for name in os.listdir(folder))
    first = loaded.step
say(steps=first, killed_in_mid_save=ended, leftovers=sum(n.startswith("step-") for n in os.listdir(folder)))
"""


def test_a_writer_killed_at_any_moment_leaves_the_newest_whole(disk: Path, tmp_path: Path) -> None:
    with child(tmp_path, KILLED.format(folder=str(disk / "checkpoints"), mount=False)) as c:
        event = c.event(120)
        assert event.get("steps", 0) >= 5, event
        assert event["killed_in_mid_save"] >= 1
        assert event["leftovers"] <= 4
        assert c.wait() == 0, c.log


def test_a_full_disk_costs_that_checkpoint_and_leaves_nothing(tmp_path: Path) -> None:
    if not _can_mount(tmp_path):
        pytest.skip("this machine lets nobody mount a tmpfs of their own")
    with child(tmp_path, KILLED.format(folder=str(tmp_path / "disk"), mount=True), PRIVATE) as c:
        assert c.event(120) == {"full": 28, "failures": 1, "files": ["step-000000000001"]}
        assert c.event(120) == {"after": [2, 1]}
        assert c.wait() == 0, c.log
        assert "No space left on device" in c.log
        assert "the disk is full: free space there" in c.log
