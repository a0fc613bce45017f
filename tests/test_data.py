from __future__ import annotations

import pytest

from torchft.data import DistributedSampler


def test_every_rank_of_every_group_gets_its_own_shard() -> None:
    dataset = list(range(24))
    shards = [
        list(DistributedSampler(dataset, g, num_replica_groups=3, group_rank=r, num_replicas=2, shuffle=False))
        for g in range(3)
        for r in range(2)
    ]
    assert sorted(i for s in shards for i in s) == dataset
    assert shards[3] == [3, 9, 15, 21]  # group 1, rank 1: global rank 3 of 6


def test_the_older_keyword_means_the_same() -> None:
    new = DistributedSampler([0] * 8, replica_rank=1, num_replica_groups=2, group_rank=0, num_replicas=1)
    old = DistributedSampler([0] * 8, replica_group_id=1, num_replica_groups=2, group_rank=0, num_replicas=1)
    assert list(new) == list(old)
    assert (old.global_rank, old.global_world_size) == (1, 2)


def test_the_ranks_of_the_group_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    sampler = DistributedSampler([0] * 8, replica_rank=1, num_replica_groups=2)
    assert (sampler.global_rank, sampler.global_world_size) == (5, 8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_replica_groups": 2},
        {"replica_rank": 0, "replica_group_id": 0, "num_replica_groups": 2},
        {"replica_rank": 0},
        {"replica_rank": 2, "num_replica_groups": 2},
        {"replica_rank": 0, "num_replica_groups": 2, "group_rank": 1, "num_replicas": 1},
    ],
)
def test_ranks_that_make_no_sense_are_refused(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"replica|group"):
        DistributedSampler([0] * 8, **kwargs)
