"""``assign`` against the rules of docs/protocol.md, part 1 (*Manager server*), and what its views promise together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchft.core.assignment import MAX_SOURCES, AssignmentError, View, assign, of_group
from torchft.core.membership import Member, Quorum


@st.composite
def quorums(draw: st.DrawFn) -> Quorum:
    """Up to ten members in any order, at steps that often coincide."""
    ids = draw(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=10, unique=True))
    members = [
        Member(
            rid,
            address=f"http://{rid}:1",
            store_address=f"{rid}:2",
            step=draw(st.integers(-1, 2)),
            commit_failures=draw(st.integers(0, 3)),
            lineage=draw(st.sampled_from([0, 5, 5, 5, 7])),
            waits=draw(st.sampled_from([False, False, True])),
        )
        for rid in ids
    ]
    return Quorum(draw(st.integers(1, 99)), tuple(members))


def usable(quorum: Quorum) -> bool:
    return any(m.step >= 0 for m in quorum.participants)


def views_of(quorum: Quorum, group_rank: int, init_sync: bool) -> dict[str, View]:
    return {m.replica_id: assign(quorum, m.replica_id, group_rank, init_sync) for m in quorum.participants}


@settings(max_examples=400)
@given(quorums(), st.integers(0, 9), st.booleans())
def test_view_is_the_one_the_protocol_describes(quorum: Quorum, group_rank: int, init_sync: bool) -> None:
    assume(usable(quorum))
    members = sorted(quorum.participants, key=lambda m: m.replica_id)
    max_step = max(m.step for m in members)
    up_to_date = [m for m in members if m.step == max_step]
    told = [m.lineage for m in up_to_date]
    if all(told):
        up_to_date = [m for m in up_to_date if m.lineage == max(told)]
    primary = up_to_date[group_rank % len(up_to_date)]
    behind = [m for m in members if m not in up_to_date or (init_sync and max_step == 0 and m != primary)]
    recovering = [m for m in behind if not m.waits]
    not_recovering = [m for m in up_to_date if m not in behind]
    for rank, me in enumerate(members):
        view = assign(quorum, me.replica_id, group_rank, init_sync)
        assert view.quorum_id == quorum.quorum_id
        assert (view.replica_rank, view.replica_world_size) == (rank, len(members))
        assert view.replica_ids == tuple(m.replica_id for m in members)
        assert view.store_address == primary.store_address
        assert view.max_step == max_step
        assert view.max_world_size == len(up_to_date)
        assert view.max_replica_rank == (up_to_date.index(me) if me in up_to_date else None)
        assert view.commit_failures == max(m.commit_failures for m in members)
        assert view.heal == (me in recovering)
        if me in recovering:
            source = not_recovering[(recovering.index(me) + group_rank) % len(not_recovering)]
            assert view.recover_src_replica_rank == members.index(source)
            assert view.recover_src_manager_address == source.address
        else:
            assert (view.recover_src_replica_rank, view.recover_src_manager_address) == (None, "")
        assert view.recovering_replica_ranks == tuple(members.index(m) for m in recovering)
        told_of = {members[s.replica_rank].replica_id for s in view.recover_sources}
        assert told_of <= {m.replica_id for m in not_recovering}
        assert len(told_of) == (min(MAX_SOURCES, len(not_recovering)) if me in behind else 0)


@settings(max_examples=300)
@given(quorums(), st.integers(0, 9))
def test_after_a_heal_all_members_tell_one_lineage(quorum: Quorum, group_rank: int) -> None:
    assume(usable(quorum))
    told = {m.replica_id: m.lineage for m in quorum.participants}
    views = views_of(quorum, group_rank, init_sync=False)
    assert len({view.lineage for view in views.values()}) == 1
    at_max = [m.lineage for m in quorum.participants if m.step == max(n.step for n in quorum.participants)]
    if 0 not in at_max:
        waiting = {m.replica_id for m in quorum.participants if m.waits}
        after = {view.lineage if view.heal else told[rid] for rid, view in views.items() if rid not in waiting}
        assert after <= {max(at_max)}


def test_group_whose_ranks_hold_parts_of_different_states_has_none() -> None:
    assert of_group([(7, 5)]) == (7, 5)
    assert of_group([(7, 5), (7, 5)]) == (7, 5)
    assert of_group([(8, 6), (7, 5)]) == (-1, 0)
    assert of_group([(-1, 5), (7, 5)]) == (-1, 0)
    assert of_group([(-1, 5), (-1, 5)]) == (-1, 5)
    assert of_group([(7, 5), (7, 6)]) == (-1, 0)


@settings(max_examples=300)
@given(quorums(), st.integers(0, 9), st.booleans())
def test_every_recovering_member_has_one_source_that_knows_it(q: Quorum, group_rank: int, init_sync: bool) -> None:
    assume(usable(q))
    views = views_of(q, group_rank, init_sync)
    steps = {m.replica_id: m.step for m in q.participants}
    served = [
        (view.replica_rank, dst, view.replica_ids[dst])
        for view in views.values()
        for dst in view.recover_dst_replica_ranks
    ]
    assert len({dst for _, dst, _ in served}) == len(served), "nobody is served twice"
    assert {rid for _, _, rid in served} == {rid for rid, view in views.items() if view.heal}
    for source, _, rid in served:
        assert views[rid].recover_src_replica_rank == source
        server = views[rid].replica_ids[source]
        assert not views[server].heal, "a source does not recover itself"
        assert steps[server] == views[rid].max_step
    load = [len(view.recover_dst_replica_ranks) for view in views.values() if not view.recover_sources]
    assert max(load) - min(load) <= 1, "the load is spread evenly"


@settings(max_examples=300)
@given(quorums(), st.integers(0, 9), st.booleans())
def test_healing_member_knows_all_sources_its_own_first(q: Quorum, group_rank: int, init_sync: bool) -> None:
    assume(usable(q))
    views = views_of(q, group_rank, init_sync)
    healing = [v.replica_rank for v in views.values() if v.heal]
    primary = views[q.participants[0].replica_id].store_address.removesuffix(":2")
    behind = [v.replica_id for v in q.participants if views[v.replica_id].recover_sources]
    usual = {v.replica_rank for rid, v in views.items() if v.max_replica_rank is not None and rid not in behind}
    for rid, view in views.items():
        assert sorted(view.recovering_replica_ranks) == sorted(healing)
        if rid not in behind:
            assert not view.heal
            continue
        if view.heal:
            assert view.recover_sources[0].replica_rank == view.recover_src_replica_rank
        named = [s.replica_rank for s in view.recover_sources]
        assert len(set(named)) == len(named) == min(MAX_SOURCES, len(usual))
        assert set(named) <= usual
        assert rid not in {view.replica_ids[r] for r in named}
        for source in view.recover_sources:
            assert source.manager_address == f"http://{view.replica_ids[source.replica_rank]}:1"
        if init_sync and view.max_step == 0:
            assert [view.replica_ids[r] for r in named] == [primary], "all begin from one initialisation"


@settings(max_examples=300)
@given(quorums(), st.integers(0, 9), st.booleans(), st.randoms())
def test_all_members_agree_on_the_facts_whatever_the_order(q: Quorum, group_rank: int, init_sync: bool, random) -> None:  # type: ignore[no-untyped-def]
    assume(usable(q))
    views = views_of(q, group_rank, init_sync)
    facts = {
        (v.quorum_id, v.replica_ids, v.store_address, v.max_step, v.max_world_size, v.commit_failures)
        for v in views.values()
    }
    assert len(facts) == 1
    assert sorted(v.replica_rank for v in views.values()) == list(range(len(views)))
    ranks_there = [v.max_replica_rank for v in views.values() if v.max_replica_rank is not None]
    assert sorted(ranks_there) == list(range(next(iter(facts))[4]))
    shuffled = list(q.participants)
    random.shuffle(shuffled)
    assert views_of(Quorum(q.quorum_id, tuple(shuffled)), group_rank, init_sync) == views


@settings(max_examples=200)
@given(quorums(), st.booleans())
def test_group_ranks_agree_on_who_takes_part(quorum: Quorum, init_sync: bool) -> None:
    assume(usable(quorum))
    n = assign(quorum, quorum.participants[0].replica_id, 0, init_sync).max_world_size
    for rid in (m.replica_id for m in quorum.participants):
        views = [assign(quorum, rid, rank, init_sync) for rank in range(n)]
        participation = {(v.quorum_id, v.replica_rank, v.max_replica_rank, v.max_world_size, v.max_step) for v in views}
        assert len(participation) == 1
    stores = {assign(quorum, quorum.participants[0].replica_id, rank, init_sync).store_address for rank in range(n)}
    assert len(stores) == n, "each of the up-to-date hosts one rank's rendezvous"


@given(quorums(), st.integers(0, 9), st.booleans())
def test_member_without_state_never_serves(quorum: Quorum, group_rank: int, init_sync: bool) -> None:
    without = [m.replica_id for m in quorum.participants if m.step < 0]
    for m in quorum.participants:
        view = assign(quorum, m.replica_id, group_rank, init_sync)
        if not usable(quorum):
            assert (view.max_step, view.heal, view.recover_dst_replica_ranks) == (-1, False, ())
        elif m.replica_id in without:
            assert view.heal != m.waits
            assert view.recover_sources
            assert view.recover_dst_replica_ranks == ()
            assert view.max_replica_rank is None


@given(quorums(), st.lists(st.integers(0, 9), min_size=10, max_size=10), st.integers(0, 9))
def test_a_state_is_lost_when_the_job_was_further_than_all_members(q: Quorum, seen: list[int], former: int) -> None:
    members = tuple(replace(m, seen_step=s) for m, s in zip(q.participants, seen, strict=False))
    newest = max(m.step for m in members)
    furthest = max(m.seen_step for m in members)
    former = former if newest <= 0 else 0  # the lighthouse says nothing where there is a state
    quorum = Quorum(q.quorum_id, members, former_step=former)
    for m in members:
        view = assign(quorum, m.replica_id, 0, True)
        if furthest > 0 and furthest > newest:
            assert (view.lost_step, view.lost_by_survivor) == (furthest, True)
        else:
            assert (view.lost_step, view.lost_by_survivor) == (former, False)


@given(quorums())
def test_stranger_gets_an_error_that_names_it(quorum: Quorum) -> None:
    with pytest.raises(AssignmentError, match="'stranger' is not in quorum"):
        assign(quorum, "stranger", 0, True)
