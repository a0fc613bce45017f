"""A thousand quorums leave nothing behind."""

from __future__ import annotations

from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from torchft.process_group import ProcessGroup, ProcessGroupGloo
from torchft.testing.process_group_fixtures import GroupSuite
from torchft.testing.process_group_life import Held
from torchft.testing.process_group_suite import each


class TestAPairOfGloo(GroupSuite):
    world_size = 2

    @classmethod
    def make(cls, timeout: timedelta = timedelta(seconds=30)) -> ProcessGroup:
        return ProcessGroupGloo(timeout=timeout)

    def test_after_a_thousand_reconfigurations_descriptors_threads_and_memory_are_as_before(self) -> None:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store = f"127.0.0.1:{server.port}"
        groups = [self.make() for _ in range(2)]

        def reconfigure(times: int) -> Held:
            for _ in range(times):
                self.meet(store, groups)
                assert self.sum_of_ranks(groups) == [1.0, 1.0]
            return Held.by()

        before = reconfigure(100)
        middle = reconfigure(450)
        after = reconfigure(450)
        assert after.descriptors <= before.descriptors + 2
        assert after.threads <= before.threads + 2
        assert after.resident - middle.resident < 4 << 20
        for pg in groups:
            pg.shutdown()


def test_what_is_written_for_the_configurations_of_a_long_job_does_not_stay_in_its_store() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups = [ProcessGroupGloo(timedelta(seconds=20)) for _ in range(2)]
    keys = []
    for quorum in range(4):
        store = f"127.0.0.1:{server.port}/torchft/{quorum}"
        each(groups, lambda rank, pg, store=store: pg.configure(store, f"r{rank}", rank, 2))
        keys.append(server.num_keys())
    assert keys == [2, 4, 4, 4]
    for pg in groups:
        pg.shutdown()
