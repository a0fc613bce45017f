"""Groups that keep a part of the suite's promises: a group of one, and a Manager's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from tests.groups import running
from torchft.process_group import ManagedProcessGroup, ProcessGroup, ProcessGroupDummy
from torchft.testing.process_group_suite import AllreduceSuite, CollectivesSuite, each


class TestProcessGroupDummy(CollectivesSuite):
    world_size: ClassVar[int] = 1

    @pytest.fixture
    def groups(self) -> list[ProcessGroup]:
        return [ProcessGroupDummy(0, 1)]


class TestManagedProcessGroup(AllreduceSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def managed(cls) -> Iterator[list[ManagedProcessGroup]]:
        """Groups of which all participate: the first step heals all but one."""
        with running(min_replicas=cls.world_size) as job:
            managed = [ManagedProcessGroup(job.replica(f"group{i}").manager) for i in range(cls.world_size)]
            assert each(list(managed), _begin).count(None) == cls.world_size - 1
            assert each(list(managed), _commit) == [True] * cls.world_size
            yield managed

    @pytest.fixture
    def groups(self, managed: list[ManagedProcessGroup]) -> Iterator[list[ProcessGroup]]:
        """A step of all groups, by rank."""
        ranks = each(list(managed), _begin)
        groups: list[ProcessGroup] = [managed[ranks.index(rank)] for rank in range(len(managed))]
        yield groups
        assert each(groups, _commit) == [True] * len(groups)


def _begin(_: int, pg: Any) -> int | None:
    pg._manager.start_quorum()
    pg._manager.wait_quorum()
    rank: int | None = pg._manager.participating_rank()
    return rank


def _commit(_: int, pg: Any) -> bool:
    committed: bool = pg._manager.should_commit()
    return committed
