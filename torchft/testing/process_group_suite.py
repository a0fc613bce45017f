"""What every process group promises, as tests: subclass :class:`ProcessGroupSuite` in a test module.

Members live in threads of the test's process where that shows the promise, and in processes of their own where
one has to die or to stand still. The promises by subject: ``process_group_collectives``, what collectives compute;
``process_group_life``, a group's life; ``process_group_faults``, members that die or stop.
"""

from __future__ import annotations

from torchft.testing.process_group_collectives import AllreduceSuite, CollectivesSuite
from torchft.testing.process_group_faults import FaultsSuite
from torchft.testing.process_group_fixtures import each
from torchft.testing.process_group_life import LifeSuite

__all__ = ["AllreduceSuite", "CollectivesSuite", "FaultsSuite", "LifeSuite", "ProcessGroupSuite", "each"]


class ProcessGroupSuite(CollectivesSuite, LifeSuite, FaultsSuite):
    """All promises. A subclass says how a group is made."""
