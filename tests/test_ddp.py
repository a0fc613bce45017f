"""DistributedDataParallel over a Manager: the reducer, the buckets, and what happens when a bucket fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.groups import TIMEOUT, Groups, Replica
from torchft.checkpointing.pg_transport import PGTransport
from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.optim import OptimizerWrapper
from torchft.process_group import FakeProcessGroupWrapper, ProcessGroupGloo


class Branches(nn.Module):
    """Uses one of two layers, as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        out: torch.Tensor = (self.left if left else self.right)(self.shared(x))
        return out


class Trainee:
    """A model under DDP in one group."""

    def __init__(
        self,
        groups: Groups,
        name: str,
        net: nn.Module,
        wrap: Callable[..., nn.Module] = DistributedDataParallel,
        pg: Any = None,
        checkpoint_transport: Any = None,
        **kwargs: Any,
    ) -> None:
        self.net = net
        self.inner = torch.optim.Adam(net.parameters(), lr=0.05)
        self.replica: Replica = groups.replica(
            name,
            pg=pg or ProcessGroupGloo(timeout=TIMEOUT),
            state_dict=lambda: {"model": net.state_dict(), "optim": self.inner.state_dict()},
            load_state_dict=self._load,
            checkpoint_transport=checkpoint_transport,
        )
        self.manager = self.replica.manager
        self.model = wrap(self.manager, net, **kwargs)
        self.optimizer = OptimizerWrapper(self.manager, self.inner)

    def _load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optim"])

    def step(self, *inputs: Any) -> None:
        self.optimizer.zero_grad()
        self.model(*inputs).square().mean().backward()
        self.optimizer.step()

    def weights(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.net.parameters())


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 8), nn.Tanh())))


@pytest.mark.parametrize("wrap", [DistributedDataParallel, PureDistributedDataParallel])
def test_gradients_are_those_of_the_joined_batch(pair: Groups, wrap: Callable[..., nn.Module]) -> None:
    a, b = (Trainee(pair, n, mlp(0), wrap) for n in "ab")
    reference = mlp(0)
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    pair.together(lambda: a.step(x), lambda: b.step(y))  # heals b; a alone is counted
    reference.load_state_dict(a.net.state_dict())

    def gradients(t: Trainee, batch: torch.Tensor) -> None:
        t.optimizer.zero_grad()
        t.model(batch).square().mean().backward()
        assert t.manager.should_commit()

    pair.together(lambda: gradients(a, x), lambda: gradients(b, y))
    reference(torch.cat([x, y])).square().mean().backward()
    for p, q, r in zip(a.net.parameters(), b.net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        torch.testing.assert_close(p.grad, r.grad)


def test_parameters_that_only_one_group_used_stay_identical_everywhere(pair: Groups) -> None:
    torch.manual_seed(0)
    a, b = Trainee(pair, "a", Branches()), Trainee(pair, "b", Branches())
    for i in range(4):
        x = torch.randn(2, 4)
        pair.together(lambda x=x: a.step(x, True), lambda x=x, i=i: b.step(x, i % 2 == 0))
        assert a.weights() == b.weights()
    assert a.net.left.weight.grad is not None  # type: ignore[union-attr]


def test_a_late_joiner_has_the_buckets_of_those_that_trained_before(groups: Groups) -> None:
    a = Trainee(groups, "a", mlp(1), bucket_cap_mb=0.0001)
    for _ in range(4):
        a.step(torch.randn(2, 8))
    b = Trainee(groups, "b", mlp(2), bucket_cap_mb=0.0001)
    groups.train_together(*((t.manager, lambda t=t: t.step(torch.randn(2, 8))) for t in (a, b)), steps=20)
    assert a.weights() == b.weights()


@pytest.mark.parametrize("bucket", range(4))
def test_a_failed_bucket_costs_the_step_and_the_reducer_is_as_good_as_new(groups: Groups, bucket: int) -> None:
    pg = FakeProcessGroupWrapper(ProcessGroupGloo(timeout=TIMEOUT))
    t = Trainee(groups, "a", mlp(1), pg=pg, bucket_cap_mb=0.0001)
    t.step(torch.randn(2, 8))
    before = t.weights()
    calls = 0
    real = pg.allreduce

    def fail_at(*args: Any) -> Any:
        nonlocal calls
        if calls == bucket:
            pg.report_future_error(RuntimeError("injected"))
        calls += 1
        return real(*args)

    pg.allreduce = fail_at  # type: ignore[method-assign]
    t.step(torch.randn(2, 8))
    assert calls == bucket + 1, "after the error the step's collectives are no-ops"
    assert "injected" in str(t.manager.errored())
    assert t.weights() == before
    pg.allreduce = real  # type: ignore[method-assign]
    for _ in range(3):
        t.step(torch.randn(2, 8))
    assert t.manager.current_step() == 4


def test_options_that_would_break_joining_are_refused(groups: Groups) -> None:
    manager = groups.replica("a").manager
    with pytest.raises(ValueError, match="static_graph"):
        DistributedDataParallel(manager, mlp(0), static_graph=True)


@pytest.mark.parametrize("transport", ["default", "pg in place"])
def test_a_model_whose_forward_pass_writes_buffers_heals_while_it_computes(groups: Groups, transport: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 256), nn.BatchNorm1d(256), nn.Linear(256, 256), nn.BatchNorm1d(256))

    def make(name: str) -> Trainee:
        pg = ProcessGroupGloo(timeout=TIMEOUT)
        mine: list[Trainee] = []

        def live() -> dict[str, Any]:
            return {"user": {"default": {"model": mine[0].net.state_dict(), "optim": mine[0].inner.state_dict()}}}

        moved = PGTransport(pg, TIMEOUT, torch.device("cpu"), state_dict=live) if transport != "default" else None
        mine.append(Trainee(groups, name, net(), pg=pg, checkpoint_transport=moved))
        return mine[0]

    a = make("a")
    for _ in range(3):
        a.step(torch.randn(8, 8))
    b = make("b")
    for _ in range(3):  # it heals in its first step, while both forward passes write their statistics

        def step(t: Trainee) -> None:
            t.optimizer.zero_grad()
            for _ in range(20):
                out = t.model(torch.randn(8, 8))
            out.square().mean().backward()
            t.optimizer.step()

        groups.train_together(*((t.manager, lambda t=t: step(t)) for t in (a, b)), steps=12)
        assert a.weights() == b.weights()
    assert b.manager.errored() is None
