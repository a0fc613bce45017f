"""What is in a directory of checkpoints and is none: it is passed over for the one before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash

from torchft.checkpointing import load_latest, save

LONG = 60.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("world_size", 0),
        ("world_size", -1),
        ("world_size", 10**9),
        ("world_size", float("inf")),
        ("step", True),
        ("files", {"a\0b": [1, ""]}),
        ("files", {"x" * 300: [1, ""]}),
        ("files", {"rank-0.data": [-1, ""]}),
        ("files", {"rank-0.data": [1e400, ""]}),
    ],
)
def test_a_marker_that_nobody_writes_is_passed_over(tmp_path: Path, key: str, value: object) -> None:
    for step in (5, 10):
        save(tmp_path, step, {"step": step}).result(LONG)
    path = tmp_path / "step-000000000010" / "COMPLETE.json"
    body = json.dumps({**json.loads(json.loads(path.read_bytes())["body"]), key: value})
    path.write_text(json.dumps({"body": body, "xxh3_128": xxhash.xxh3_128_hexdigest(body.encode())}))
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 5


@pytest.mark.parametrize("name", ["COMPLETE.json", "rank-0.data"])
def test_what_is_no_file_is_passed_over_and_not_waited_for(tmp_path: Path, name: str) -> None:
    for step in (5, 10):
        save(tmp_path, step, {"step": step}).result(LONG)
    path = tmp_path / "step-000000000010" / name
    path.unlink()
    os.mkfifo(path)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 5
