"""Replica groups as threads of the test's process, with real servers, sockets and gloo groups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import ProcessGroupGloo

T = TypeVar("T")
TIMEOUT = timedelta(seconds=40)


class Replica:
    """One rank of one group: a small model, its optimizer, its manager.

    Args:
        lighthouse: address.
        name: of the group.
        seed: of the model's first weights.
        **kwargs: for the Manager.
    """

    def __init__(self, lighthouse: str, name: str, seed: int = 0, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Linear(4, 3)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.inner = torch.optim.Adam(self.model.parameters(), lr=0.1)
        options: dict[str, Any] = {
            "pg": ProcessGroupGloo(timeout=TIMEOUT),
            "load_state_dict": self.load,
            "state_dict": self.save,
            "min_replica_size": 1,
            "timeout": TIMEOUT,
            "quorum_timeout": TIMEOUT,
            "connect_timeout": TIMEOUT,
            "rank": 0,
            "world_size": 1,
            "lighthouse_addr": lighthouse,
            "replica_id": name,
        }
        self.manager = Manager(**{**options, **kwargs})
        self.optimizer = OptimizerWrapper(self.manager, self.inner)

    def save(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.inner.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optim"])

    def compute(self, value: float) -> None:
        """A backward pass whose gradients are all ``value``, averaged by hand."""
        for p in self.model.parameters():
            p.grad = torch.full_like(p, value)
        for p in self.model.parameters():
            assert p.grad is not None
            self.manager.allreduce(p.grad).wait()

    def step(self, value: float = 1.0) -> None:
        self.optimizer.zero_grad()
        self.compute(value)
        self.optimizer.step()

    def weights(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())


class Groups:
    """Runs functions in threads and ends every manager at the end."""

    def __init__(self, lighthouse: LighthouseServer) -> None:
        self.lighthouse = lighthouse
        self._pool = ThreadPoolExecutor(16)
        self._replicas: list[Replica] = []
        self._lock = threading.Lock()
        self.finishing = threading.Event()
        """Loops that ask ``at_the_end`` are to end."""
        self._last: int | None = None

    def replica(self, name: str, **kwargs: Any) -> Replica:
        replica = Replica(self.lighthouse.address(), name, **kwargs)
        with self._lock:
            self._replicas.append(replica)
        return replica

    def start(self, call: Callable[[], T]) -> Future[T]:
        return self._pool.submit(call)

    def together(self, *calls: Callable[[], T]) -> list[T]:
        """Runs the calls at the same time; their results, or the first error."""
        futures = [self._pool.submit(call) for call in calls]
        return [f.result(timeout=120) for f in futures]

    def train_together(self, *loops: tuple[Manager, Callable[[], object]], steps: int = 3, groups: int = 2) -> int:
        """Takes steps in all the loops until they have taken ``steps`` more than the first that ``groups`` groups took
        part in; they end at the same step, which is returned.

        Nobody waits for a group that is on its way to the others, so those train on until it takes part.
        """
        goal: list[int] = []
        lock = threading.Lock()

        def loop(manager: Manager, step: Callable[[], object]) -> None:
            while not goal or manager.current_step() < goal[0]:
                step()
                with lock:
                    if not goal and manager.num_participants() == groups:
                        goal.append(manager.current_step() + steps)  # the others are here, or one step behind

        self.together(*(lambda m=m, s=s: loop(m, s) for m, s in loops))
        return goal[0]

    def at_the_end(self, step: int) -> bool:
        """Whether a loop ends before this step. All that train together end before the same one: whoever ends sooner
        leaves the others in a step for which they wait until their timeout.
        """
        with self._lock:
            if self.finishing.is_set() and self._last is None:
                self._last = step + 2  # the others are at this step, or one step away
            return self._last is not None and step >= self._last

    def close(self) -> None:
        for replica in self._replicas:
            replica.manager.shutdown(wait=False)
        self._pool.shutdown(wait=True)


@contextmanager
def running(min_replicas: int = 1, **lighthouse: int) -> Iterator[Groups]:
    """A lighthouse and its groups."""
    server = LighthouseServer("127.0.0.1:0", min_replicas, **{"heartbeat_timeout_ms": 5000, **lighthouse})
    groups = Groups(server)
    try:
        yield groups
    finally:
        groups.close()
        server.shutdown()
