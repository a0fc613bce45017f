from __future__ import annotations

import pytest
import torch

from tests.groups import Groups
from torchft.optim import OptimizerWrapper


def test_it_steps_only_when_the_step_is_committed(groups: Groups) -> None:
    a = groups.replica("a")
    before = a.weights()
    a.optimizer.zero_grad()
    a.compute(1.0)
    a.manager.report_error(RuntimeError("no"))
    a.optimizer.step()
    assert a.weights() == before
    a.optimizer.zero_grad()
    assert all(p.grad is None for p in a.model.parameters())
    a.compute(1.0)
    a.optimizer.step()
    assert a.weights() != before


def test_it_is_the_wrapped_optimizer_in_everything_else(groups: Groups) -> None:
    a = groups.replica("a")
    assert isinstance(a.optimizer, torch.optim.Optimizer)
    assert a.optimizer.param_groups is a.inner.param_groups
    assert a.optimizer.state is a.inner.state
    extra = torch.nn.Parameter(torch.zeros(2))
    a.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert a.inner.param_groups[1]["lr"] == 0.5
    state = a.optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    a.optimizer.load_state_dict(state)
    assert a.inner.param_groups[0]["lr"] == 0.25
    with pytest.raises(ValueError, match="closure"):
        a.optimizer.step(lambda: 0.0)


def test_what_is_wrapped_already_or_no_optimizer_is_refused(groups: Groups) -> None:
    a = groups.replica("a")
    with pytest.raises(TypeError, match="wrapped already"):
        OptimizerWrapper(a.manager, a.optimizer)
    with pytest.raises(TypeError, match="a Manager, not a torch optimizer"):
        OptimizerWrapper(a.inner, a.manager)  # type: ignore[arg-type]


def test_a_scheduler_on_the_wrapped_optimizer_works(groups: Groups) -> None:
    a = groups.replica("a")
    scheduler = torch.optim.lr_scheduler.StepLR(a.inner, step_size=1, gamma=0.5)
    a.step()
    scheduler.step()
    assert a.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
