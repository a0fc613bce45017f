"""What the examples train, and the hash by which groups show that they hold the same state."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import RandomSampler

from examples.digits import Metrics, Net, Settings, accuracy, batches, load_data, state_bytes, state_hash


def test_the_digits_are_split_without_overlap_and_the_same_way_each_time() -> None:
    train, held_out = load_data("digits")
    assert train.tensors[0].shape == (1437, 1, 8, 8)
    assert held_out.tensors[0].shape == (360, 1, 8, 8)
    assert train.tensors[0].min() >= 0
    assert train.tensors[0].max() == 1
    assert set(held_out.tensors[1].tolist()) == set(range(10))
    assert torch.equal(load_data("digits")[1].tensors[0], held_out.tensors[0])


def test_an_unknown_data_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="imagenet"):
        load_data("imagenet")


def test_batches_go_on_over_epochs_in_another_order() -> None:
    train, _ = load_data("digits")
    stream = batches(train, RandomSampler(train), 512)
    first, _, second = (x for x, _ in itertools.islice(stream, 3))  # two batches an epoch, the rest is dropped
    assert first.shape == (512, 1, 8, 8)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("image", "state_mb"), [((1, 8, 8), 0), ((1, 8, 8), 3), ((3, 32, 32), 0), ((3, 32, 32), 3)])
def test_the_table_adds_the_bytes_asked_for_and_no_gradients(image: tuple[int, int, int], state_mb: float) -> None:
    net, small = Net(torch.Size(image), state_mb=state_mb), Net(torch.Size(image))
    out = net(torch.rand(5, *image))
    out.sum().backward()
    assert out.shape == (5, 10)
    added = state_bytes(net.state_dict()) - state_bytes(small.state_dict())
    assert added == pytest.approx(state_mb * 1e6, abs=20_000)
    trained = sum(p.numel() for p in net.parameters() if p.grad is not None)
    assert trained - sum(p.numel() for p in small.parameters()) == (64 * 64 if state_mb else 0)


def test_the_hash_names_the_state_to_the_last_bit() -> None:
    def state(**changes: object) -> dict[str, object]:
        return {"model": {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}, "optimizer": [torch.tensor(3.0)], **changes}

    same = state_hash(state())
    assert state_hash(state()) == same
    assert state_hash({"optimizer": state()["optimizer"], "model": state()["model"]}) == same
    flipped = torch.arange(4.0)
    flipped.view(torch.int32)[2] += 1
    others = [
        state(model={"a": flipped, "b": torch.zeros(2, 2)}),
        state(model={"a": torch.arange(4.0), "b": torch.zeros(4)}),
        state(model={"a": torch.arange(4.0), "c": torch.zeros(2, 2)}),
        state(model={"a": torch.arange(4.0), "b": torch.zeros(2, 2, dtype=torch.int32)}),
        state(optimizer=[]),
    ]
    assert len({same, *map(state_hash, others)}) == 6


def test_accuracy_is_the_share_of_right_answers() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[3].expand(len(x), 10)

    _, held_out = load_data("digits")
    share = accuracy(Constant(), held_out, torch.device("cpu"))
    assert share == int((held_out.tensors[1] == 3).sum()) / 360


def test_quick_run_shortens_what_is_not_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOTAL_STEPS", "MIN_STEP_SEC", "JOIN_DELAY_SEC", "QUICK_RUN"):
        monkeypatch.delenv(name, raising=False)
    assert (Settings().total_steps(), Settings().join_delay_sec) == (1000, 10)
    monkeypatch.setenv("QUICK_RUN", "1")
    assert (Settings().total_steps(), Settings().join_delay_sec) == (250, 2)
    monkeypatch.setenv("TOTAL_STEPS", "300")
    assert Settings().total_steps() == 300


def test_the_number_of_steps_can_be_set_while_groups_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steps").write_text("7")
    monkeypatch.setenv("TOTAL_STEPS", f"@{tmp_path / 'steps'}")
    settings = Settings()
    assert settings.total_steps() == 7
    (tmp_path / "steps").write_text("8\n")
    assert settings.total_steps() == 8


def test_metrics_are_whole_lines_at_once(tmp_path: Path) -> None:
    metrics = Metrics(str(tmp_path / "events"))
    metrics.write("step", step=1)
    assert json.loads((tmp_path / "events").read_text())["step"] == 1
    Metrics("").write("step", step=1)  # nowhere
