"""What a group reports is read as it comes, line by whole line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchft.launch.watch import Commit, End, Heal, Watch


def line(**values: object) -> str:
    return json.dumps({"time": 1.5, "pid": 1, **values}) + "\n"


def test_a_file_that_is_not_there_yet_says_nothing(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "events")
    watch.look()
    assert (watch.started, watch.commits, watch.end, watch.step) == (None, [], None, 0)


def test_events_are_read_as_they_are_added_and_only_once(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "events")
    with open(watch.path, "w") as file:
        file.write(line(event="start") + line(event="healed", step=7, bytes=100))
        file.flush()
        watch.look()
        watch.look()
        assert watch.started == 1.5
        assert watch.heals == [Heal(1.5, 7, 100)]
        assert watch.step == 7

        step = line(event="step", step=8, participants=2, loss=0.25)
        file.write(line(event="failed", step=7) + step[:20])
        file.flush()
        watch.look()
        assert watch.failed_steps == 1
        assert watch.commits == []

        file.write(step[20:] + line(event="end", step=8, accuracy=0.5, state="ab"))
        file.flush()
        watch.look()
        assert watch.commits == [Commit(1.5, 8, 2, 0.25)]
        assert watch.end == End(8, 0.5, "ab")
        assert watch.step == 8


@pytest.mark.parametrize("text", ["not json\n", '{"event": "step"}\n', '{"event": "boom", "time": 1}\n', "[1]\n"])
def test_a_line_that_is_no_event_is_an_error_that_quotes_it(tmp_path: Path, text: str) -> None:
    watch = Watch(tmp_path / "events")
    watch.path.write_text(text)
    with pytest.raises(ValueError, match="not an event") as caught:
        watch.look()
    assert text.strip() in str(caught.value)
