"""The examples that communicate rarely, as their READMEs run them, and the program that compares them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from examples.characters import CONTEXT, VOCABULARY, CharacterModel, bits_per_character, load_text, windows
from examples.diloco import compare
from tests.examples.forks import Forks
from torchft.launch.processes import Children
from torchft.testing.ports import ReservedPort

ROOT = Path(__file__).resolve().parents[2]
TORCHX = shutil.which("torchx", path=str(Path(sys.executable).parent))
BITS_OF_KNOWING_NOTHING = 6.585  # log2 of the vocabulary


def test_the_text_is_english_and_its_held_out_part_is_not_trained_on() -> None:
    train, held_out = load_text()
    assert len(train) > 8 * len(held_out) > 300_000
    assert int(train.max()) < VOCABULARY
    text = "".join(chr(c + 31) if c else "\n" for c in train[:20_000].tolist())
    assert "statement" in text


def test_groups_draw_from_shares_of_their_own() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    for group, (low, high) in enumerate(((0, 100), (100, 200))):
        inputs, targets = next(windows(text, group, groups=2, batch_size=64))
        assert inputs.shape == targets.shape == (64, CONTEXT)
        assert torch.equal(targets, inputs + 1)
        assert low <= int(inputs.min()) <= int(targets.max()) < high


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fragments_are_all_of_the_model_and_nothing_twice(count: int) -> None:
    model = CharacterModel()
    parts = model.fragments(count)
    assert len(parts) == count
    assert [id(p) for part in parts for p in part.parameters()] == [id(p) for p in model.parameters()]


def test_a_model_sees_nothing_of_what_it_is_to_guess() -> None:
    torch.manual_seed(0)
    model = CharacterModel()
    characters = torch.randint(VOCABULARY, (1, CONTEXT))
    changed = characters.clone()
    changed[0, 40] = (changed[0, 40] + 1) % VOCABULARY
    before, after = model(characters), model(changed)
    assert torch.equal(before[0, :40], after[0, :40])
    assert not torch.equal(before[0, 40:], after[0, 40:])
    bits, share = bits_per_character(model, load_text()[1], pieces=32)
    assert abs(bits - BITS_OF_KNOWING_NOTHING) < 1.5
    assert share < 0.1


@pytest.mark.skipif(TORCHX is None, reason="torchx is not installed: pip install torchx")
def test_torchx_run_in_the_folder_of_local_sgd_trains_two_groups_to_one_state(tmp_path: Path) -> None:
    with ReservedPort() as kept, Children() as children:
        ask = f"--lighthouse_port={kept.port} --min_replicas=2"
        job = children.start(
            "torchx",
            ["sh", "-c", f"cd examples/localsgd && exec {TORCHX} run -- {ask}"],
            {
                "QUICK_RUN": "1",
                "TOTAL_STEPS": "100",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            },
            tmp_path / "torchx.log",
        )
        assert job.wait(250) == 0, "\n".join(job.last_lines(60))
    said = (tmp_path / "torchx.log").read_text()
    ends = re.findall(r"done: (\d+) windows, held-out ([\d.]+) bits per character, .* state (\w{32})", said)
    assert len(ends) == 2, said[-3000:]
    assert {windows for windows, _, _ in ends} == {"5"}
    assert len({state for _, _, state in ends}) == 1
    assert float(ends[0][1]) < 4
    assert "no group has been there for" in said  # the lighthouse ended with them


def test_streaming_diloco_survives_a_kill_and_sends_a_fraction_of_data_parallelism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "Children", Forks)
    options = argparse.Namespace(steps=160, step_sec=0.05, sync_every=20, patience=250.0)
    faulty = compare.run(compare.ALGORITHMS["streaming"], options, True, tmp_path / "streaming")
    assert faulty.identical
    assert faulty.alone > 0  # group 1 was away for some of the windows, and the other went on
    lines = (tmp_path / "streaming" / "group1.1.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("participants") == 2 for line in lines)  # it came back
    assert faulty.bits < 4

    options.steps = 20
    parallel = compare.run(compare.ALGORITHMS["data-parallel"], options, False, tmp_path / "parallel")
    assert parallel.identical
    assert (
        parallel.megabytes / parallel.steps > 12 * faulty.megabytes / faulty.steps
    )  # 20 times, but for steps that were tried again
    printed = compare.table({("data-parallel", False): parallel, ("streaming", True): faulty})
    assert printed.row_count == 2


def test_a_run_whose_group_fails_says_which_and_why(tmp_path: Path) -> None:
    algorithm = compare.Algorithm("too many", compare.DILOCO, {"FRAGMENTS": "9"})
    options = argparse.Namespace(steps=20, step_sec=0.0, sync_every=20, patience=120.0)
    with pytest.raises(RuntimeError, match=r"(?s)group 0 ended with 1.*FRAGMENTS=9: the model has 4 layers"):
        compare.run(algorithm, options, False, tmp_path / "run")
