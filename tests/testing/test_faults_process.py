"""Faults of a process, each done for real to a child."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.testing.child import TICKING, child
from torchft.testing.faults import Effect, continue_, kill, stop
from torchft.testing.process_state import lives, stat_of
from torchft.testing.wait import wait_until


def test_killed_is_gone_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with child(tmp_path, TICKING) as c:
        c.event()
        kill(c.pid)
        assert c.wait() == -signal.SIGKILL
        assert f"fault kill, victim process {c.pid}, step -" in caplog.text


def test_a_process_kills_itself_after_saying_so(tmp_path: Path) -> None:
    with child(tmp_path, "faults.kill(); say(still='here')") as c:
        assert c.wait() == -signal.SIGKILL
        assert f"fault kill, victim process {c.pid} (this one), step -" in c.log
        with pytest.raises(EOFError):
            c.event()


def test_stopped_stands_still_until_continued(tmp_path: Path) -> None:
    with child(tmp_path, TICKING) as c:
        c.event()
        with stop(c.pid) as effect:
            wait_until(lambda: c.state == "T", what="stopped")
            c.drain()
            assert c.events_for(0.2) == 0
            assert effect.active
        c.event()
        assert c.state != "T"
        stop(c.pid)
        wait_until(lambda: c.state == "T", what="stopped")
        continue_(c.pid)
        wait_until(lambda: c.state != "T", what="continued")
        c.event()


def test_stopped_for_a_time_goes_on_by_itself(tmp_path: Path) -> None:
    with child(tmp_path, TICKING) as c:
        c.event()
        effect = stop(c.pid, seconds=1.5)
        wait_until(lambda: c.state == "T", what="stopped")
        wait_until(lambda: not effect.active, what="the end of the stop")
        wait_until(lambda: c.state != "T", what="continued")
        c.event()


def test_a_process_stops_itself_for_a_time(tmp_path: Path) -> None:
    code = """
    ticks, longest = [time.monotonic()], [0.0]
    def tick():
        while True:
            now = time.monotonic()
            longest[0] = max(longest[0], now - ticks[-1])
            ticks.append(now)
            time.sleep(0.005)
    threading.Thread(target=tick, daemon=True).start()
    say(ready=True)
    faults.stop(seconds=1.5)
    before = len(ticks)
    while len(ticks) < before + 2:
        time.sleep(0.01)
    say(longest=longest[0])
    """
    with child(tmp_path, code) as c:
        c.event()
        wait_until(lambda: c.state == "T", what="stopped")
        assert c.event()["longest"] >= 1.4
        assert c.wait() == 0


def test_a_process_that_stopped_itself_can_be_killed_and_leaves_no_helper(tmp_path: Path) -> None:
    with child(tmp_path, "faults.stop(seconds=1000)") as c:
        wait_until(lambda: c.state == "T", what="stopped")
        children = Path(f"/proc/{c.pid}/task/{c.pid}/children").read_text().split()
        assert len(children) == 1
        kill(c.pid)
        assert c.wait() == -signal.SIGKILL
        wait_until(lambda: not lives(int(children[0])), what="the end of the helper")


def test_what_is_stopped_goes_on_when_the_one_that_stopped_it_exits(tmp_path: Path) -> None:
    with child(tmp_path, TICKING) as victim:
        victim.event()
        with child(tmp_path, f"faults.stop({victim.pid}); say(done=True)") as c:
            c.event()
            assert c.wait() == 0
        wait_until(lambda: victim.state != "T", what="continued")


@pytest.mark.parametrize("pid", [-1, 0, 1])
def test_groups_and_init_are_never_hit(pid: int) -> None:
    for hit in (kill, stop, continue_):
        with pytest.raises(ValueError, match="may be hit"):
            hit(pid)


@pytest.mark.parametrize(
    "first",
    [
        "pass",
        "import faulthandler; faulthandler.enable()",
        "signal.signal(signal.SIGSEGV, lambda *_: None)",
    ],
)
def test_segfault_is_a_real_one(tmp_path: Path, first: str) -> None:
    code = f"{first}\nt = threading.Thread(target=faults.segfault); t.start(); t.join(); say(still='here')"
    with child(tmp_path, code) as c:
        assert c.wait() == -signal.SIGSEGV
        assert "fault segfault" in c.log
        assert ("Fatal Python error: Segmentation fault" in c.log) == ("faulthandler" in first)


def test_exit_runs_nothing_more(tmp_path: Path) -> None:
    code = """
    import atexit
    atexit.register(lambda: say(atexit=True))
    try:
        faults.exit_(7)
    finally:
        say(cleanup=True)
    """
    with child(tmp_path, code) as c:
        assert c.wait() == 7
        with pytest.raises(EOFError):
            c.event()


def test_holding_the_gil_stops_all_other_threads(tmp_path: Path) -> None:
    """Also while signals come in, which would cut a plain sleep short."""
    code = """
    ticks, longest = [0], [0.0]
    def tick():
        last = time.monotonic()
        while True:
            time.sleep(0.002)
            now = time.monotonic()
            longest[0] = max(longest[0], now - last)
            last = now
            ticks[0] += 1
    caught = []
    signal.signal(signal.SIGALRM, lambda *_: caught.append(time.monotonic()))
    threading.Thread(target=tick, daemon=True).start()
    while ticks[0] < 5:
        time.sleep(0.01)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    longest[0] = 0.0
    begin = time.monotonic()
    faults.hold_gil(0.7)
    end = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    before = ticks[0]
    while ticks[0] < before + 2:
        time.sleep(0.01)
    say(longest=longest[0], held=end - begin, early=[t for t in caught if t < begin + 0.69], caught=len(caught))
    """
    with child(tmp_path, code) as c:
        event = c.event()
        assert event["held"] >= 0.7
        assert event["longest"] >= 0.65
        assert event["early"] == []
        assert event["caught"] >= 1
        assert c.wait() == 0


def test_busy_loads_the_cores_until_released(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"""
    with faults.busy(60, processes=2):
        say(started=True)
        while not os.path.exists({str(go)!r}):
            time.sleep(0.01)
    say(over=True)
    """
    with child(tmp_path, code) as c:
        c.event()
        spinners = [int(p) for p in Path(f"/proc/{c.pid}/task/{c.pid}/children").read_text().split()]
        assert len(spinners) == 2
        go.touch()
        c.event()
        assert all(not lives(p) for p in spinners)


def test_busy_ends_with_its_owner(tmp_path: Path) -> None:
    with child(tmp_path, "faults.busy(60, processes=1); say(on=True); time.sleep(60)") as c:
        c.event()
        (spinner,) = (int(p) for p in Path(f"/proc/{c.pid}/task/{c.pid}/children").read_text().split())
        wait_until(lambda: _cpu_seconds(spinner) > 0.05, what="load")
        kill(c.pid)
        c.wait()
        wait_until(lambda: not lives(spinner), what="the end of the load")


def _cpu_seconds(pid: int) -> float:
    return int(stat_of(pid)[11]) / os.sysconf("SC_CLK_TCK")


def test_effects_end_once() -> None:
    ended: list[float] = []
    with Effect("test", lambda: ended.append(time.monotonic()), seconds=0.01) as effect:
        wait_until(lambda: ended, what="its own end")
        effect.release()
    assert len(ended) == 1
