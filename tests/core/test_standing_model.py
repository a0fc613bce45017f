"""The two machines of a standing quorum against each other, under random faults (``tests/core/standing_world.py``).

What must hold at every moment is checked by the world as it goes; what must come about when the faults stop, here.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.standing_world import OPTIONS, Node, World

NAMES = "ABC"

names = st.sampled_from(NAMES)
usual = st.tuples(st.sampled_from(["act", "act", "act", "up", "down", "turn", "turn", "connect"]), names)
faults = st.tuples(st.sampled_from(["cut", "cut", "alone", "fail", "kill", "restart"]), names)
times = st.tuples(st.sampled_from(["0.01", "0.5", "2", "6", "30"]), names)
scripts = st.lists(st.one_of(usual, usual, usual, faults, times), min_size=10, max_size=100)


def carry_out(world: World, what: str, name: str) -> None:
    node = world.nodes[name]
    if what == "act":
        world.act(node)
    elif what in ("up", "down"):
        world.deliver(node, what == "up")
    elif what == "turn":  # all that concerns one node
        world.connect(node)
        for _ in range(3):
            while node.alive and node.to_lighthouse:
                world.deliver(node, True)
            while node.alive and node.to_member:
                world.deliver(node, False)
            world.act(node)
    elif what == "connect":
        world.connect(node)
    elif what == "cut":
        world.cut(node)
    elif what == "alone":  # all others are cut off from the lighthouse
        for other in world.nodes.values():
            if other is not node:
                world.cut(other)
    elif what == "fail":
        world.fail(node)
    elif what == "kill":
        world.kill(node)
    elif what == "restart":
        world.restart()
    else:
        world.pass_time(float(what))


def one_round(world: World, seconds: float) -> None:
    """Everything that can happen without a fault happens, and some time passes."""
    for node in world.nodes.values():
        world.connect(node)
        for _ in range(4):
            while node.alive and node.to_lighthouse:
                world.deliver(node, True)
            for other in world.nodes.values():
                while other.alive and other.to_member:
                    world.deliver(other, False)
        world.act(node)
    world.pass_time(seconds)


def settled(names: str) -> World:
    world = World(names)
    for _ in range(12):
        one_round(world, 0.1)
    return world


@settings(max_examples=200, deadline=None)
@given(members=st.sampled_from(["A", "AB", "AB", "ABC"]), script=scripts)
def test_whatever_happens_all_that_live_train_on_together_afterwards(
    members: str, script: list[tuple[str, str]]
) -> None:
    world = settled(members)
    for name in NAMES:
        world.nodes.setdefault(name, Node(name))
    for what, name in script:
        carry_out(world, what, name)
    # What is cut off may be waited for until all leases have run out; then a few rounds are enough.
    for _ in range(20):
        one_round(world, (OPTIONS.lease + 2 * OPTIONS.heartbeat_timeout) / 20)
    before = {node.name: node.commits for node in world.nodes.values()}
    for _ in range(20):
        one_round(world, 0.1)
    living = [node for node in world.nodes.values() if node.alive]
    assert all(node.commits >= before[node.name] + 5 for node in living), living
    steps = [node.step for node in living]
    assert not steps or max(steps) - min(steps) <= 1
    assert len({node.machine.quorum_id for node in living}) <= 1


def test_standing_steps_need_no_lighthouse() -> None:
    world = settled("AB")
    asked = world.questions
    a, b = world.nodes.values()
    world.cut(a)
    world.cut(b)
    before = a.commits
    for _ in range(50):
        for node in (a, b):
            world.act(node)
            world.act(node)
    assert world.questions == asked
    assert a.commits >= before + 50


def joined(world: World, name: str) -> Node:
    """A new member, once it works in a quorum, or has had the time to."""
    world.nodes[name] = joiner = Node(name)
    for _ in range(12):
        one_round(world, 0.01)
        if joiner.working is not None:
            break
    return joiner


def test_joiner_is_in_within_two_steps_of_asking_and_nobody_fails_for_it() -> None:
    world = settled("AB")
    a, b = world.nodes.values()
    step = a.step
    joiner = joined(world, "C")
    assert joiner.working is not None
    assert joiner.working.participants[0].step <= step + 3  # two after the one that was under way
    assert a.failures == b.failures == joiner.failures == 0


def test_joiner_of_a_member_alone_is_in_at_the_next_step() -> None:
    world = settled("A")
    (a,) = world.nodes.values()
    step = a.step
    joiner = joined(world, "B")
    assert joiner.working is not None
    assert joiner.working.participants[0].step <= step + 1  # the one after that under way
    assert a.failures == joiner.failures == 0


def test_restarted_lighthouse_costs_no_step_and_takes_a_joiner_in() -> None:
    world = settled("AB")
    a, b = world.nodes.values()
    newest = max(world.quorums)
    world.restart()
    for _ in range(5):
        one_round(world, 0.01)
    assert a.failures == b.failures == 0
    assert max(world.quorums) == newest
    world.nodes["C"] = joiner = Node("C")
    for _ in range(16):
        one_round(world, 0.01)
    assert joiner.commits > 0
    assert max(world.quorums) > 2**32
    assert a.failures == b.failures == joiner.failures == 0
