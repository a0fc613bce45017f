"""DiLoCo against a plain account of the papers' algorithms in float64; imagined groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from torch import nn

from tests.local_sgd.job import ImaginedManager, gradient, imagined, inner_step, uneven_model, values
from torchft.local_sgd import DiLoCo
from torchft.local_sgd.averaging import Averaging, bucket_layout
from torchft.manager import Manager

GROUPS, EVERY, STEPS = 3, 6, 48
INNER_LR, OUTER_LR, MOMENTUM = 0.2, 0.7, 0.9
OF_FRAGMENTS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]], 3: [[0, 1], [2], [3, 4]]}


def modules(model: nn.Sequential, fragments: int) -> list[nn.Module]:
    return {1: [model], 2: [model[:2], model[2]], 3: list(model)}[fragments]


@dataclass
class Papers:
    """The algorithms as they are written down: one loop over time, all groups in it."""

    fragments: int
    delay: int
    alpha: float
    fails: tuple[int, ...]
    shared: list[torch.Tensor] = field(default_factory=lambda: values(uneven_model(dtype=torch.float64)))

    def run(self) -> list[list[torch.Tensor]]:
        """The parameters of each group in the end; those that were synchronised are in ``shared``."""
        local = [[p.clone() for p in self.shared] for _ in range(GROUPS)]
        momentum: dict[int, torch.Tensor] = {}
        gap = EVERY // self.fragments
        committed = attempts = 0
        sent: dict[int, torch.Tensor] = {}
        for t in range(1, STEPS + self.delay + 1):
            for group in range(GROUPS):
                local[group] = [p - INNER_LR * gradient(group, t - 1, p) for p in local[group]]
            if t % gap == 0:
                due = OF_FRAGMENTS[self.fragments][committed % self.fragments]
                sent = {i: sum(self.shared[i] - local[g][i] for g in range(GROUPS)) / GROUPS for i in due}  # type: ignore[misc]
            if t >= gap and t % gap == self.delay:
                attempts += 1
                for i, pseudogradient in sent.items():
                    if attempts - 1 in self.fails:
                        for group in range(GROUPS):
                            local[group][i] = self.shared[i].clone()
                        continue
                    # SGD with Nesterov momentum
                    momentum[i] = MOMENTUM * momentum[i] + pseudogradient if i in momentum else pseudogradient
                    self.shared[i] = self.shared[i] - OUTER_LR * (pseudogradient + MOMENTUM * momentum[i])
                    for group in range(GROUPS):
                        local[group][i] = self.alpha * local[group][i] + (1 - self.alpha) * self.shared[i]
                if attempts - 1 not in self.fails:
                    committed += 1
        return local


@pytest.mark.parametrize("outer_optimizers", ["one", "one for each"])
@pytest.mark.parametrize("bucketize", [False, True])
@pytest.mark.parametrize(
    ("fragments", "delay", "alpha", "fails"),
    [
        (1, 0, 0.0, ()),
        (1, 0, 0.0, (1, 2)),
        (1, 5, 0.3, ()),
        (2, 0, 0.5, (0,)),
        (2, 2, 0.5, (3,)),
        (3, 1, 0.0, (2, 5)),
        (3, 1, 1.0, ()),
    ],
)
def test_follows_the_algorithms_of_the_papers(
    fragments: int, delay: int, alpha: float, fails: tuple[int, ...], bucketize: bool, outer_optimizers: str
) -> None:
    papers = Papers(fragments, delay, alpha, fails)
    expected = papers.run()

    def run(manager: Manager, group: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model = uneven_model(dtype=torch.float64)
        pieces = modules(model, fragments)
        inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
        outers = [
            torch.optim.SGD(m.parameters(), lr=OUTER_LR, momentum=MOMENTUM, nesterov=True)
            for m in ([model] if outer_optimizers == "one" else pieces)
        ]
        diloco = DiLoCo(
            manager,
            pieces,
            inner,
            outers[0] if outer_optimizers == "one" else outers,
            EVERY,
            use_bucketization=bucketize,
            fragment_sync_delay=delay,
            fragment_update_alpha=alpha,
        )
        with diloco:
            for step in range(STEPS + delay):
                inner_step(model, inner, group, step)
                # The loop still sees its own gradients.
                assert all(p.grad is not None for p in model.parameters())
        shared = [t for f in diloco.state_dict()["fragments"] for t in f.values()]
        assert diloco.bytes_reduced == 8 * sum(cast(ImaginedManager, manager).sizes)
        return values(model), shared

    for group, (live, shared) in enumerate(imagined(GROUPS, run, fails)):
        for p, e in zip([*live, *shared], [*expected[group], *papers.shared], strict=True):
            torch.testing.assert_close(p, e, rtol=1e-11, atol=1e-11)


def test_a_pending_fragment_is_finished_when_the_block_ends() -> None:
    def run(manager: Manager, group: int) -> bool:
        model = uneven_model(dtype=torch.float64)
        start = values(model)
        inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
        outer = torch.optim.SGD(model.parameters(), lr=1.0)
        with DiLoCo(manager, [model], inner, outer, 4, fragment_sync_delay=3):
            for step in range(5):
                inner_step(model, inner, group, step)
            assert manager.current_step() == 0
        assert manager.current_step() == 1
        return all(not torch.equal(a, b) for a, b in zip(start, values(model), strict=True))

    assert imagined(2, run) == [True, True]


def test_buckets_keep_the_order_and_the_cap_and_never_mix_dtypes() -> None:
    f4 = lambda n: torch.zeros(n)  # noqa: E731
    f8 = lambda n: torch.zeros(n, dtype=torch.float64)  # noqa: E731
    tensors = [f4(10), f8(10), f4(0), f4(10), f4(1), f8(100), f4(1)]
    assert bucket_layout(tensors, None) == [[0], [1], [3], [4], [5], [6]]
    assert bucket_layout(tensors, 80) == [[0, 3], [1], [4, 6], [5]]
    assert bucket_layout(tensors, 1 << 20) == [[0, 3, 4, 6], [1, 5]]


@pytest.mark.parametrize("cap_bytes", [None, 1, 40, 160, 1 << 20])
def test_averages_do_not_depend_on_the_buckets(cap_bytes: int | None) -> None:
    shapes = [(3, 4), (7,), (), (0, 5), (2, 2, 2)]

    def value(group: int, i: int) -> torch.Tensor:
        return torch.randn(shapes[i], generator=torch.Generator().manual_seed(10 * group + i))

    def run(manager: Manager, group: int) -> list[torch.Tensor]:
        like = [value(0, i) for i in range(len(shapes))]
        return Averaging(manager, like, lambda i, into: into.copy_(value(group, i)), cap_bytes).wait()

    for averages in imagined(3, run):
        for i, average in enumerate(averages):
            assert torch.equal(average, torch.stack([value(g, i) for g in range(3)]).mean(0))
