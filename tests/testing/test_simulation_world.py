"""The simulated world keeps to its rules: time, stops, deaths, streams, collectives; and the checker to its own."""

from __future__ import annotations

from typing import Any

import pytest

from torchft.core.membership import Member, Quorum
from torchft.runtime.life import Sign
from torchft.testing.simulation.clock import Clock
from torchft.testing.simulation.collective import Contribution, Mesh
from torchft.testing.simulation.invariants import TORN, Commit, Invariants
from torchft.testing.simulation.network import CLIENT, SERVER, Network, Stream
from torchft.testing.simulation.world import Process, World


@pytest.fixture
def world() -> World:
    return World(1)


def process(world: World, name: str, rate: float = 1.0) -> Process:
    p = Process(world, name, Clock(rate, 50.0))
    p.begin_life()
    return p


# ---------------------------------------------------------------- time, processes


def test_a_timer_runs_by_its_process_clock(world: World) -> None:
    fast, slow = process(world, "fast", 2.0), process(world, "slow", 0.5)
    rang: list[tuple[str, float]] = []
    for p in (slow, fast):
        p.after(1.0, lambda p=p: rang.append((p.name, world.now)))
    world.run(10.0)
    assert rang == [("fast", 0.5), ("slow", 2.0)]
    assert (fast.time, slow.time) == (70.0, 55.0)


def test_a_stopped_process_does_everything_as_it_is_continued(world: World) -> None:
    p = process(world, "p")
    seen: list[tuple[str, float]] = []
    p.after(1.0, lambda: seen.append(("timer", p.time)))
    world.to(p, 0.5, lambda: seen.append(("message", p.time)))
    p.pause()
    world.at(3.0, p.resume)
    world.run(10.0)
    assert sorted(seen) == [("message", 53.0), ("timer", 53.0)]


def test_nothing_reaches_a_later_life(world: World) -> None:
    p = process(world, "p")
    p.after(1.0, pytest.fail)
    world.to(p, 1.0, pytest.fail)
    p.end_life()
    p.begin_life()
    world.run(2.0)
    assert p.life == 3


# ---------------------------------------------------------------- network


class Ear:
    """Holds an end of a stream."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def received(self, stream: Stream, message: object) -> None:
        self.heard.append(message)

    def ended(self, stream: Stream, cause: str) -> None:
        self.heard.append(f"end: {cause}")


class Line:
    """A client, a server, and a stream between them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.net = Network(world, ping_timeout=0.9)
        self.client, self.server = process(world, "c"), process(world, "s")
        self.at_client, self.at_server = Ear(), Ear()
        self.stream = self.net.connect(self.client, self.server, self.at_client, self.at_server)

    def run(self, seconds: float) -> None:
        self.world.run(self.world.now + seconds)


@pytest.fixture
def line(world: World) -> Line:
    return Line(world)


def test_messages_arrive_once_and_in_order(line: Line) -> None:
    for i in range(50):
        line.stream.send(CLIENT, i)
    line.run(1)
    assert line.at_server.heard == list(range(50))


def test_what_is_sent_into_a_cut_arrives_when_it_heals_and_the_other_direction_does_not_suffer(line: Line) -> None:
    line.net.cut("c", "s")
    line.stream.send(CLIENT, "late")
    line.stream.send(SERVER, "at once")
    line.run(0.5)
    assert (line.at_server.heard, line.at_client.heard) == ([], ["at once"])
    line.net.mend("c", "s")
    line.stream.send(CLIENT, "later")
    line.run(0.5)
    assert line.at_server.heard == ["late", "later"]


@pytest.mark.parametrize("how", ["cut", "back", "pause", "vanish"])
def test_server_gives_up_a_client_whose_pings_are_not_answered(line: Line, how: str) -> None:
    if how in ("cut", "back"):
        line.net.cut(*("c", "s") if how == "cut" else ("s", "c"))
    elif how == "pause":
        line.client.pause()
        line.net.look_for_silence()
    else:
        line.client.end_life(host=True)
        line.net.died(line.client)
    line.run(0.8)
    assert line.at_server.heard == []
    line.run(0.2)
    assert line.at_server.heard == ["end: pings are not answered"]
    assert line.at_client.heard == (["end: the other side closed it"] if how == "cut" else [])
    if how == "pause":
        line.client.resume()
        line.run(0.1)
        assert line.at_client.heard == ["end: the other side closed it"]


def test_a_short_cut_ends_nothing(line: Line) -> None:
    for _ in range(5):
        line.net.cut("c", "s")
        line.run(0.5)
        line.net.mend("c", "s")
        line.run(0.5)
    assert line.stream.whole


def test_death_closes_and_the_life_address_tells_it_from_a_lost_connection(line: Line) -> None:
    signs: list[Sign] = []
    life = line.client.life
    line.net.break_streams("c", "s")
    line.run(0.1)
    assert line.at_client.heard == line.at_server.heard == ["end: the connection was lost"]
    line.net.look(line.server, line.client, life, signs.append)
    line.run(0.1)
    line.client.pause()
    line.net.look(line.server, line.client, life, signs.append)
    line.run(0.1)
    line.client.end_life()
    line.net.look(line.server, line.client, life, signs.append)
    line.run(0.1)
    line.client.end_life(host=True)
    line.net.look(line.server, line.client, life, signs.append)
    line.run(0.1)
    assert signs == [Sign.ALIVE, Sign.ALIVE, Sign.GONE, Sign.UNKNOWN]


# ---------------------------------------------------------------- collectives


class Rank:
    """A member of a mesh."""

    def __init__(self, world: World, name: str) -> None:
        self.process = process(world, name)
        self.got: list[object] = []

    def mesh_built(self, mesh: Mesh) -> None:
        self.got.append("built")

    def reduced(self, mesh: Mesh, contributions: dict[str, Contribution]) -> None:
        self.got.append(sorted(contributions))

    def mesh_failed(self, mesh: Mesh, cause: str) -> None:
        self.got.append("failed")


def meet(world: World, names: str) -> tuple[Network, Mesh, dict[str, Rank]]:
    net = Network(world, 1.0)
    ranks = {name: Rank(world, name) for name in names}
    mesh = Mesh(net, (1, 0), tuple(names))
    for name, rank in ranks.items():
        mesh.join(name, rank)
    world.run(world.now + 0.1)
    return net, mesh, ranks


def test_a_collective_is_complete_when_all_have_contributed(world: World) -> None:
    _, mesh, ranks = meet(world, "abc")
    for name in "ab":
        mesh.contribute(name, Contribution(1, 0, 7, True))
    world.run(1.0)
    assert [r.got for r in ranks.values()] == [["built"]] * 3
    mesh.contribute("c", Contribution(1, 0, 7, True))
    world.run(2.0)
    assert [r.got for r in ranks.values()] == [["built", ["a", "b", "c"]]] * 3


def test_a_death_in_a_collective_can_leave_some_with_a_result_and_others_with_an_error() -> None:
    outcomes = set()
    for seed in range(60):
        world = World(seed)
        _, mesh, ranks = meet(world, "abc")
        for name in "abc":
            mesh.contribute(name, Contribution(1, 0, 7, True))
        ranks["c"].process.end_life()
        mesh.leave("c", "it died")
        world.run(1.0)
        outcomes.add(tuple(r.got[-1] == "failed" for name, r in ranks.items() if name != "c"))
        mesh.contribute("a", Contribution(1, 1, 8, True))
        world.run(2.0)
        assert ranks["a"].got[-1] == "failed", "nobody works on in a broken mesh"
    assert outcomes == {(False, False), (False, True), (True, False), (True, True)}


def test_through_a_cut_nothing_completes_until_it_heals(world: World) -> None:
    net, mesh, ranks = meet(world, "ab")
    net.cut("a", "b")
    for name in "ab":
        mesh.contribute(name, Contribution(1, 0, 7, True))
    world.run(1.0)
    assert [r.got for r in ranks.values()] == [["built"]] * 2
    net.mend("a", "b")
    world.run(2.0)
    assert [r.got[-1] for r in ranks.values()] == [["a", "b"]] * 2


# ---------------------------------------------------------------- invariants


def commit(who: str, quorum_id: int, step: int, **other: Any) -> Commit:
    values: dict[str, Any] = {
        "rank": 0,
        "members": ("a", "b"),
        "participants": (1, 2),
        "divisor": 2,
        "ancestor": 10 * step,
        "state": 10 * step + 10,
    }
    return Commit(who, quorum_id=quorum_id, step=step, **{**values, **other})


def checked(*commits: Commit, others: tuple[int, ...] = ()) -> int | None:
    """The invariant that these break."""
    invariants = Invariants(World(1))
    for c in commits:
        invariants.committed(c, others or (c.ancestor,))
    return None if invariants.violation is None else invariants.violation.invariant


def test_what_is_in_order_is_no_violation() -> None:
    assert checked(commit("a", 1, 3), commit("b", 1, 3), commit("a", 1, 4), commit("b", 1, 4)) is None
    assert checked(commit("a", 1, 3), commit("c", 2, 3, members=("b", "c"))) is None


def test_other_participants_or_another_divisor_break_invariant_1() -> None:
    assert checked(commit("a", 1, 3), commit("b", 1, 3, participants=(1, 3))) == 1
    assert checked(commit("a", 1, 3), commit("b", 1, 3, participants=(1, 2, 3), divisor=3)) == 1
    assert checked(commit("a", 1, 3, participants=(1,))) == 1


def test_progress_of_a_quorum_that_was_taken_over_breaks_invariant_2() -> None:
    taken_over = commit("c", 2, 3, members=("c", "d"))
    assert checked(commit("a", 1, 3), taken_over, commit("b", 1, 4)) == 2
    assert checked(taken_over, commit("a", 3, 4)) is None


def test_going_back_and_leaps_break_invariant_3() -> None:
    assert checked(commit("a", 1, 3), commit("a", 2, 3)) == 3
    assert checked(commit("a", 1, 3), commit("a", 2, 5)) == 3
    invariants = Invariants(World(1))
    invariants.committed(commit("a", 1, 3), (30,))
    invariants.healed("a", 0, 9, 90, had_state=True)
    invariants.committed(commit("a", 2, 9), (90,))
    assert invariants.violation is None
    invariants.healed("a", 0, 5, 50, had_state=True)
    assert invariants.violation is not None
    assert invariants.violation.invariant == 3


def test_different_or_half_written_states_break_invariant_4() -> None:
    assert checked(commit("a", 1, 3), commit("b", 1, 3, state=99)) == 4
    assert checked(commit("a", 1, 3), others=(30, 31)) == 4
    assert checked(commit("a", 1, 3, ancestor=TORN), others=(TORN, 30)) == 4


def test_an_id_of_two_memberships_breaks_invariant_5() -> None:
    invariants = Invariants(World(1))
    invariants.named(Quorum(7, (Member("a"), Member("b"))), "L0")
    invariants.named(Quorum(7, (Member("a"), Member("b"))), "a")
    assert invariants.violation is None
    invariants.named(Quorum(7, (Member("a"), Member("c"))), "L1")
    assert invariants.violation is not None
    assert "invariant 5 broken" in str(invariants.violation)
