"""The lighthouse command, as a process."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from click.testing import CliRunner

from torchft.cli.lighthouse import lighthouse
from torchft.coordination import LighthouseClient

MINUTE = timedelta(minutes=1)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    arguments = ["--min_replicas=1", "--bind=127.0.0.1:0", "--heartbeat_timeout_ms=3000", "--end_when_idle_sec=0.3"]
    child = subprocess.Popen(
        [sys.executable, "-m", "torchft.cli.lighthouse", *arguments], stderr=subprocess.PIPE, text=True
    )
    yield child
    child.kill()
    child.wait()
    assert child.stderr is not None
    child.stderr.close()


def test_it_ends_by_itself_once_the_last_group_is_gone_and_not_before_the_first_came(
    process: subprocess.Popen[str],
) -> None:
    assert process.stderr is not None
    address = re.search(r"lighthouse at (http://\S+)", process.stderr.readline() + process.stderr.readline())
    assert address is not None
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(process.stderr or ()))
    reader.start()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)  # nobody has come yet: it waits
    client = LighthouseClient(address[1], MINUTE)
    client.heartbeat("group", MINUTE)
    client.close()
    assert process.wait(60) == 0
    reader.join(30)
    assert any("no group has been there for 0.3 s" in line for line in rest)


@pytest.mark.parametrize("bind", ["somewhere", "[::]:99999"])
def test_an_address_that_is_none_is_an_error_of_one_line(bind: str) -> None:
    result = CliRunner().invoke(lighthouse, ["--min_replicas=1", f"--bind={bind}"])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith(f"Error: '{bind}' is not a bind address")
