"""Training runs that mix implementations: lighthouse, survivor and joiner of either kind.

A shared state transport is what two kinds need to heal each other (`folder_transport.py`): their own ones differ on
purpose. docs/interoperation.md says what works and what cannot.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from benchmarks.processes import OURS, PEER, Child, ChildError, Cluster, Event, Implementation

pytestmark = pytest.mark.peer

SCRIPT = Path(__file__).resolve().parent / "train_mini.py"
STEPS = 8
"""How long replicas train together before their states are compared."""


class Run:
    """One lighthouse and the groups that train with it."""

    def __init__(self, cluster: Cluster, lighthouse: Implementation, shared: bool = False) -> None:
        self._cluster = cluster
        self._lighthouse = cluster.lighthouse(lighthouse, join_timeout_ms=1000, heartbeat_timeout_ms=1500)
        self._shared = shared
        self._seeds = iter(range(1, 100))

    def group(self, impl: Implementation, *args: object) -> Child:
        """Starts one more group, with weights and data of its own."""
        seed = next(self._seeds)
        name = f"{impl.name}{seed}"
        where = ["--lighthouse", self._lighthouse, "--replica", name, "--seed", seed]
        if self._shared:
            where += ["--folder", self._cluster.folder / f"states-of-{name}"]
        child = self._cluster.spawn(impl, SCRIPT, *where, *args, name=name)
        child.hello()
        return child


def trains(child: Child, participants: int, after: int = 0) -> Event:
    """Waits for a step that ``child`` commits with that many participants, beyond step ``after``."""
    return child.wait("step", 150, lambda e: e["committed"] and e["participants"] == participants and e["step"] > after)


def assert_same_states(*children: Child) -> int:
    """They train together for ``STEPS`` steps, with the same state after each. Returns the last of these steps."""
    first = max(trains(c, len(children))["step"] for c in children if c.alive())
    first = max(first, *(trains(c, len(children), after=_newest(c) - 1)["step"] for c in children))
    for child in children:
        trains(child, len(children), after=first + STEPS)
    seen = [{e["step"]: e["hash"] for e in c.all("step") if e["committed"]} for c in children]
    common = [step for step in range(first, first + STEPS + 1) if all(step in s for s in seen)]
    assert len(common) == STEPS + 1
    for step in common:
        assert len({s[step] for s in seen}) == 1, f"states differ after step {step}"
    assert len({seen[0][step] for step in common}) == len(common), "the state does not change"
    return common[-1]


def _newest(child: Child) -> int:
    return max((e["step"] for e in child.all("step")), default=0)


def test_two_peer_groups_train_against_our_lighthouse_and_one_rejoins_after_a_kill(cluster: Cluster) -> None:
    run = Run(cluster, OURS)
    survivor, victim = run.group(PEER), run.group(PEER)
    step = assert_same_states(survivor, victim)
    victim.kill()
    alone = trains(survivor, 1, after=step)
    rejoined = run.group(PEER)
    rejoined.wait("healed", 100)
    assert assert_same_states(survivor, rejoined) > alone["step"]


def test_two_of_our_groups_train_against_the_peers_lighthouse_and_a_late_joiner_heals(cluster: Cluster) -> None:
    run = Run(cluster, PEER)
    first = run.group(OURS, "--ddp")
    alone = trains(first, 1, after=5)
    joiner = run.group(OURS, "--ddp")
    joiner.wait("healed", 100)
    assert assert_same_states(first, joiner) > alone["step"]


@pytest.mark.parametrize("lighthouse", [OURS, PEER], ids=lambda i: f"{i.name}-lighthouse")
def test_both_kinds_train_together_and_heal_each_other_through_a_shared_transport(
    cluster: Cluster, lighthouse: Implementation
) -> None:
    run = Run(cluster, lighthouse, shared=True)
    ours = run.group(OURS)
    step = trains(ours, 1, after=5)["step"]
    peer = run.group(PEER)
    peer.wait("healed", 100)
    together = assert_same_states(ours, peer)
    assert together > step

    ours.kill()
    step = trains(peer, 1, after=together)["step"]
    ours = run.group(OURS)
    ours.wait("healed", 100)
    together = assert_same_states(ours, peer)
    assert together > step

    peer.kill()
    trains(ours, 1, after=together)


@pytest.mark.parametrize(
    ("transport", "cause"),
    [((), "does not speak torchft-http"), (("--pg-transport",), "not a torchft checkpoint")],
    ids=["http", "process-group"],
)
def test_our_joiner_says_why_it_cannot_heal_from_the_peers_own_transport(
    cluster: Cluster, transport: tuple[str, ...], cause: str
) -> None:
    run = Run(cluster, OURS)
    first = run.group(PEER, *transport)
    trains(first, 1, after=5)
    joiner = run.group(OURS, *transport)
    failed = joiner.wait("step", 150, lambda e: e["error"] is not None)
    assert not failed["committed"]
    assert cause in failed["error"]
    assert "transport" in failed["error"]
    assert not joiner.all("healed")


@pytest.mark.parametrize("transport", [(), ("--pg-transport",)], ids=["http", "process-group"])
def test_a_peers_joiner_that_cannot_heal_from_our_transport_stops_nobody(
    cluster: Cluster, transport: tuple[str, ...]
) -> None:
    run = Run(cluster, OURS)
    first = run.group(OURS, *transport)
    before = trains(first, 1, after=5)
    joiner = run.group(PEER, *transport)
    with contextlib.suppress(ChildError):  # its gloo may end the process: what it is sent is no message it knows
        joiner.wait("step", 60)
    assert not joiner.all("healed")
    joiner.close()
    trains(first, 1, after=before["step"] + STEPS)
