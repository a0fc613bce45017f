"""Plans that happen: inside a process, and to others from outside."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.groups import running
from tests.testing.child import TICKING, child
from torchft.testing.faults import Chaos, InjectedFault, Injector, Link, Plan
from torchft.testing.wait import wait_until


def test_a_process_is_killed_at_its_step_and_the_step_is_logged(tmp_path: Path) -> None:
    code = """
    injector = faults.Injector("kill@step=3")
    for step in range(10):
        injector.on_step(step)
        say(step=step)
    """
    with child(tmp_path, code) as c:
        assert c.wait() == -signal.SIGKILL
        assert [c.event()["step"] for _ in range(3)] == [0, 1, 2]
        assert f"fault kill, victim process {c.pid} (this one), step 3" in c.log


def test_once_holds_over_restarts(tmp_path: Path) -> None:
    code = f"""
    injector = faults.Injector("exit(5)@step=2,once={tmp_path}/markers/exited")
    for step in range(4):
        injector.on_step(step)
    say(end=True)
    """
    with child(tmp_path, code) as c:
        assert c.wait() == 5
    with child(tmp_path, code) as c:
        assert c.event() == {"end": True}
        assert c.wait() == 0


def test_each_life_has_a_schedule_of_its_own() -> None:
    """Else a process with a rate would be killed at the same second of each life and never get beyond it."""
    plan = Plan.parse("kill@every=1s")
    assert plan.times(1000, life=0)[0] != plan.times(1000, life=1)[0]


def test_an_exception_is_raised_in_the_thread_that_steps() -> None:
    with Injector('raise@step=1; raise(KeyError, "gone")@step=2') as injector:
        injector.on_step(0)
        with pytest.raises(InjectedFault, match="injected"):
            injector.on_step(1)
        with pytest.raises(KeyError, match="gone"):
            injector.on_step(2)
        injector.on_step(2)
        assert [(a.kind, a.step) for a in injector.acts] == [("raise", 1), ("raise", 2)]


def test_who_names_the_process() -> None:
    for name, hit in (("replica_1", True), ("replica_2", False)):
        injector = Injector("raise@step=0,who=replica_1", name=name)
        if hit:
            with pytest.raises(InjectedFault):
                injector.on_step(0)
        else:
            injector.on_step(0)


def test_attached_to_a_manager_each_quorum_is_a_step() -> None:
    with running() as groups:
        a = groups.replica("a")
        injector = Injector("raise@step=2,who=a; raise@step=1,who=b").attach(a.manager)
        a.step()
        a.step()
        with pytest.raises(InjectedFault):
            a.step()
        assert a.manager.current_step() == 2
        a.step()
        assert a.manager.current_step() == 3
        with pytest.raises(RuntimeError, match="attached"):
            injector.attach(a.manager)
        injector.close()
        assert "start_quorum" not in vars(a.manager)
        a.step()


@pytest.mark.parametrize("plan", ["cut@step=1", "continue@step=1"])
def test_a_plan_that_is_not_possible_inside_is_refused(plan: str) -> None:
    with pytest.raises(ValueError, match=plan):
        Injector(plan)


@pytest.mark.parametrize("plan", ["raise@step=1", "hold_gil(1s)@step=1", "segfault@every=1s", "block@step=1"])
def test_a_plan_that_is_not_possible_outside_is_refused(plan: str) -> None:
    with pytest.raises(ValueError, match=r"can only be done|none was given"):
        Chaos(plan)


def test_network_faults_at_a_step_end_after_their_time() -> None:
    with Link("127.0.0.1:9", name="store") as link, Injector("refuse(2s)@step=1", links=[link]) as injector:
        injector.on_step(1)
        assert not _accepts(link)
        wait_until(lambda: _accepts(link), what="the end of it")
        assert injector.acts[0].victim == "store"


def test_the_same_network_fault_again_lasts_for_its_own_time() -> None:
    with Link("127.0.0.1:9") as link, Injector("refuse(100ms)@step=1; refuse@step=2", links=[link]) as injector:
        injector.on_step(1)
        injector.on_step(2)
        ended = threading.Event()
        threading.Timer(0.3, ended.set).start()
        assert ended.wait(30)
        assert not _accepts(link)
        injector.close()
        assert _accepts(link)


def _accepts(link: Link) -> bool:
    host, _, port = link.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=30).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        pass  # it was accepted, and is reset since the target is not there
    return True


def test_chaos_kills_the_living_until_none_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with child(tmp_path, TICKING) as a, child(tmp_path, TICKING) as b:
        children = {"a": a, "b": b}

        def living() -> dict[str, int]:
            return {name: c.pid for name, c in children.items() if c.process.poll() is None}

        with Chaos("kill@every=50ms,seed=1", living) as chaos:
            assert a.wait() == b.wait() == -signal.SIGKILL
        victims = [act.victim for act in chaos.acts]
        assert sorted(set(victims)) == ["a", "b"]
        assert [act.seconds for act in chaos.acts] == sorted(act.seconds for act in chaos.acts)
        assert caplog.text.count("fault kill, victim process") == len(victims)


def test_the_same_seed_hits_the_same_victims() -> None:
    """On links, which survive it."""
    links = [Link("127.0.0.1:9", name=name) for name in "abcde"]
    try:
        hit: list[list[str]] = []
        for order, seed in ((links, 1), (links[::-1], 1), (links, 2)):
            chaos = Chaos(Plan.parse("cut@every=1steps; delay(1s)@every=2steps", seed), links=order)
            for step in range(1, 30):
                chaos.on_step(step)
            chaos.stop()
            hit.append([act.victim for act in chaos.acts])
        assert hit[0] == hit[1] != hit[2]
        assert set(hit[0]) == set("abcde")
    finally:
        for link in links:
            link.close()


def test_chaos_continues_what_it_has_stopped(tmp_path: Path) -> None:
    with child(tmp_path, TICKING) as a, child(tmp_path, TICKING) as b:
        a.event()
        b.event()
        chaos = Chaos("stop@every=20ms", lambda: [a.pid, b.pid]).start()
        wait_until(lambda: a.state == b.state == "T", what="both stopped")
        chaos.stop()
        assert len(chaos.acts) == 2  # what stands still is not stopped again
        for c in (a, b):
            wait_until(lambda c=c: c.state != "T", what="continued")
        with pytest.raises(RuntimeError, match="once"):
            chaos.start()


def test_chaos_continues_by_plan_only_what_it_has_stopped(tmp_path: Path) -> None:
    with child(tmp_path, TICKING) as a:
        a.event()
        with Chaos("continue@every=1steps; stop@step=2", lambda: {"a": a.pid}) as chaos:
            chaos.on_step(1)
            chaos.on_step(2)
            wait_until(lambda: a.state == "T", what="stopped")
            chaos.on_step(3)
            wait_until(lambda: a.state != "T", what="continued")
            assert [(act.kind, act.step) for act in chaos.acts] == [("stop", 2), ("continue", 3)]


def test_chaos_goes_on_when_a_victim_is_gone_or_the_callable_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with child(tmp_path, "pass") as gone:
        gone.wait()
    asked: list[float] = []

    def pids() -> list[int]:
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise OSError("no list today")
        return [gone.pid]

    with Chaos("kill@every=10ms", pids):
        wait_until(lambda: len(asked) >= 4, what="further acts")
    assert "no list today" in caplog.text
