"""The state file of a lighthouse: what survives a crash, what is refused, and that ids are never used twice."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import pytest

from torchft.cli.lighthouse import default_state_file
from torchft.coordination import LighthouseClient, LighthouseServer
from torchft.coordination.record import RecordError, StateFile, last_from_json
from torchft.core.election import MAX_EPOCH, LastQuorum, first_id
from torchft.testing.faults import limit_file_size

MINUTE = timedelta(minutes=1)

WRITER = """
import os, sys
from torchft.coordination.record import StateFile
file = StateFile(sys.argv[1])
os.write(1, b"open\\n")
while True:
    os.write(1, b"%d\\n" % file.advance())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "lighthouse.json"


def taken(path: Path, above: int = 0) -> int:
    """The epoch that one start of a lighthouse takes."""
    file = StateFile(path)
    try:
        return file.advance(above)
    finally:
        file.close()


def test_each_start_takes_the_next_epoch(path: Path) -> None:
    assert [taken(path) for _ in range(3)] == [1, 2, 3]
    assert taken(path, above=10) == 11
    assert taken(path, above=5) == 12


def test_the_record_is_readable_by_people_and_nobody_else_may_write_it(path: Path) -> None:
    taken(path)
    assert json.loads(path.read_text().splitlines()[0])["epoch"] == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_a_writer_that_is_killed_leaves_the_last_record_or_the_one_before(path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(20)]
            process.send_signal(signal.SIGKILL)
            said += process.stdout.read().splitlines()
        finally:
            process.kill()
            process.wait()
        told = int(said[-1])
        # What it announced is on the disk; one more may be, which nobody heard of.
        assert taken(path) in (told + 1, told + 2)


def test_a_record_that_is_cut_short_is_refused_and_left(path: Path) -> None:
    taken(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(RecordError, match=r"damaged.*mv .*lighthouse.json"):
            StateFile(path)
        assert path.read_bytes() == whole[:size]


def test_every_flipped_bit_is_found(path: Path) -> None:
    taken(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(RecordError):
            StateFile(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{}\n", b"[1, 2]\na\n", b"\xff" * 100, b"x" * 1_000_000, b'{"epoch": 3}\n0\n'],
    ids=["empty", "newline", "json", "list", "binary", "huge", "no checksum"],
)
def test_a_foreign_file_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(RecordError, match="not a lighthouse's"):
        StateFile(path)
    assert path.read_bytes() == content


def test_after_moving_a_damaged_record_away_it_starts(path: Path) -> None:
    taken(path)
    path.write_bytes(b"?")
    with pytest.raises(RecordError):
        StateFile(path)
    path.rename(f"{path}.damaged")
    assert taken(path) == 1


def test_two_lighthouses_cannot_use_one_file(path: Path) -> None:
    first = LighthouseServer("127.0.0.1:0", 1, state_file=path)
    try:
        with pytest.raises(RecordError, match=rf"in use by another lighthouse \(process {os.getpid()}\)"):
            LighthouseServer("127.0.0.1:0", 1, state_file=path)
    finally:
        first.shutdown()
    LighthouseServer("127.0.0.1:0", 1, state_file=path).shutdown()


def test_a_forked_child_does_not_hold_the_lock_after_its_parents_death(path: Path) -> None:
    """The parent forks a child that outlives it, and is killed."""
    program = """
import os, sys, threading
from torchft.coordination.record import StateFile
file = StateFile(sys.argv[1])
child = os.fork()
if child:
    threading.Event().wait()
os.write(1, b"%d\\n" % os.getpid())
threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        child = int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
    try:
        assert taken(path) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        assert process.stdout.read() == b"", "the child has ended, too"


def test_a_full_disk_is_said_and_costs_no_record(path: Path) -> None:
    assert taken(path) == 1
    before = path.read_bytes()
    file = StateFile(path)
    try:
        with limit_file_size(8):
            assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 8
            with pytest.raises(RecordError, match=r"cannot be written: .*--state_file"):
                file.advance()
        assert (file.epoch, path.read_bytes()) == (1, before)
        assert not Path(f"{path}.new").exists()
        assert file.advance() == 2
    finally:
        file.close()


def test_the_last_quorum_is_remembered_until_it_is_another_one(path: Path) -> None:
    last = LastQuorum(first_id(1) + 5, (("a:1", "10.0.0.1:7"), ("b:ü", "")))
    file = StateFile(path)
    assert file.last is None
    file.advance()
    file.remember(last)
    with limit_file_size(8), pytest.raises(RecordError):
        file.remember(None)
    file.close()
    file = StateFile(path)
    assert (file.epoch, file.last) == (1, last)
    file.advance()
    assert file.last == last
    file.remember(None)
    file.close()
    file = StateFile(path)
    assert (file.epoch, file.last) == (2, None)
    file.close()


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"quorum_id": "1", "members": []},
        {"quorum_id": -1, "members": []},
        {"quorum_id": 1, "members": {}},
        {"quorum_id": 1, "members": ["ab"]},
        {"quorum_id": 1, "members": [["a"]]},
        {"quorum_id": 1, "members": [["", "b"]]},
        {"quorum_id": 1, "members": [["a", 1]]},
    ],
    ids=str,
)
def test_a_last_quorum_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="last quorum"):
        last_from_json(value)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be locked: File exists"):
        StateFile(tmp_path / "file" / "lighthouse.json")


def test_the_last_epoch_has_no_successor(path: Path) -> None:
    assert taken(path, above=MAX_EPOCH - 1) == MAX_EPOCH
    with pytest.raises(RecordError, match="there is none after"):
        taken(path)


def test_ids_grow_across_restarts(path: Path) -> None:
    ids = []
    for _ in range(3):
        server = LighthouseServer("127.0.0.1:0", 1, heartbeat_timeout_ms=2000, state_file=path)
        try:
            client = LighthouseClient(server.address(), MINUTE)
            with ThreadPoolExecutor(1) as asking:
                asked = asking.submit(client.quorum, "a", MINUTE)
                while not asked.done():  # it shows that it lives, as every group does that waits
                    client.heartbeat("a", MINUTE)
                    wait([asked], timeout=0.2)
                ids.append(asked.result().quorum_id)
            client.close()
        finally:
            server.shutdown()
    assert ids == [first_id(epoch) + 1 for epoch in (1, 2, 3)]


def test_the_command_keeps_a_file_of_the_user_for_a_fixed_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_STATE_DIR", str(tmp_path))
    names = {default_state_file(bind) for bind in ("[::]:29510", "127.0.0.1:29510", "127.0.0.1:29511")}
    assert len(names) == 3
    assert {n.parent for n in names if n} == {tmp_path}
    assert default_state_file("[::]:29510") == default_state_file("0.0.0.0:29510")
    assert default_state_file("[::]:0") is None


def test_the_command_says_it_when_there_is_no_place_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHFT_STATE_DIR", str(tmp_path / "file"))
    assert default_state_file("[::]:29510") is None
    assert "--state_file" in caplog.text


def test_the_command_ends_with_a_clear_message_when_the_file_is_damaged(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("garbage")
    command = [sys.executable, "-m", "torchft.cli.lighthouse", "--min_replicas", "1", "--bind", "127.0.0.1:0"]
    ended = subprocess.run([*command, "--state_file", str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"mv {path}" in ended.stderr
