"""Who is refused because its group has another number of ranks."""

from __future__ import annotations

from torchft.core.membership import Member, Membership, Options, Quorum


def _group(replica_id: str, ranks: int) -> Member:
    return Member(replica_id, world_size=ranks, standing=True)


def _membership(*there: Member) -> Membership:
    machine = Membership(Options(min_replicas=5))
    for member in there:
        machine.request(member, 0.0)
    return machine


def test_the_first_that_asks_says_how_many_ranks_a_group_has() -> None:
    machine = _membership(_group("a", 2))
    assert machine.misfits.refuse(_group("b", 2)) is None
    assert machine.misfits.refuse(_group("c", 3)) == _group("a", 2)
    assert [r for r in "abc" if r in machine.misfits] == ["c"]


def test_many_dead_members_hide_no_living_one() -> None:
    names = [f"a{i:02}" for i in range(40)]
    machine = _membership(*(_group(name, 2) for name in names))
    for name in names[:-1]:  # in order of their names
        machine.failed(name, "its process ended", 0.1)
    assert machine.misfits.refuse(_group("b", 3)) == _group(names[-1], 2)


def test_who_asks_again_is_not_its_own_obstacle() -> None:
    assert _membership(_group("a", 2)).misfits.refuse(_group("a", 4)) is None


def test_who_is_refused_does_not_count_as_alive() -> None:
    machine = _membership(_group("a", 2))
    machine.misfits.refuse(_group("c", 3))
    machine.heartbeat("c", 0.1)
    machine.attach("c", active=True, now=0.1)
    assert machine.healthy() == ("a",)


def test_when_the_others_are_gone_it_is_let_in() -> None:
    machine = _membership(_group("a", 2))
    late = _group("c", 3)
    machine.misfits.refuse(late)
    machine.failed("a", "its process ended", 0.2)
    assert machine.misfits.refuse(late) is None
    machine.request(late, 0.3)
    assert machine.healthy() == ("c",)


def test_members_of_an_adopted_quorum_have_no_known_number_and_refuse_nobody() -> None:
    machine = Membership(Options(min_replicas=1))
    machine.adopt(Quorum(7, (Member("a", step=3),)), size=1, now=0.0)
    assert machine.misfits.refuse(_group("b", 3)) is None
    assert machine.misfits.refuse(_group("c", 0)) is None


def test_who_asks_without_a_session_is_not_refused_and_nobody_because_of_it() -> None:
    assert _membership(_group("a", 2)).misfits.refuse(Member("b", world_size=3)) is None
    assert _membership(Member("a", world_size=2)).misfits.refuse(_group("b", 3)) is None
