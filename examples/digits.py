"""What the examples train, and how they report: data, model, accuracy, state hash. Nothing about fault tolerance.

By default the task is the 1797 handwritten digits (8 x 8 pixels) that scikit-learn ships: real data, no
download. A small CNN reaches more than 95 % on the 360 held-out ones within some hundred steps.
``DATASET=cifar10`` trains on CIFAR10, where torchvision is installed.

Two rules make "all groups hold the same state" worth checking:

- every group initialises the model with its own seed, so equal states can only come from a transfer;
- the model has nothing that depends on one group's batch (no batch norm), so equal states stay equal.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils.data import Sampler, TensorDataset

__all__ = [
    "Metrics",
    "Net",
    "Settings",
    "accuracy",
    "batches",
    "load_data",
    "state_bytes",
    "state_hash",
    "tensors_of",
]


def _quick(slow: str, quick: str) -> str:
    return quick if os.environ.get("QUICK_RUN", "0") not in ("", "0") else slow


def _env(name: str, slow: str, quick: str | None = None) -> str:
    return os.environ.get(name) or _quick(slow, slow if quick is None else quick)


@dataclass(frozen=True)
class Settings:
    """One run, read from the environment. ``QUICK_RUN=1`` takes the second default where two are given."""

    replica_group: int = field(default_factory=lambda: int(_env("REPLICA_GROUP_ID", "0")))
    """``REPLICA_GROUP_ID``: which of the groups this is, from 0."""

    replica_groups: int = field(default_factory=lambda: int(_env("NUM_REPLICA_GROUPS", "2")))
    """``NUM_REPLICA_GROUPS``: how many groups the data is divided among. Fewer may be running at any time."""

    dataset: str = field(default_factory=lambda: _env("DATASET", "digits"))
    """``DATASET``: ``digits`` or ``cifar10``."""

    transport: str = field(default_factory=lambda: _env("TRANSPORT", "pg"))
    """``TRANSPORT``: what carries the state to a joiner, ``pg`` (the process group) or ``http``."""

    total: str = field(default_factory=lambda: _env("TOTAL_STEPS", "1000", "250"))
    """``TOTAL_STEPS``: committed steps after which every group ends, 1000 or 250. ``@file``: the number is read
    from that file at each step, so that it can be set while groups train; it must be ahead of all of them."""

    step_sec: float = field(default_factory=lambda: float(_env("MIN_STEP_SEC", "0.05", "0.02")))
    """``MIN_STEP_SEC``: least seconds a step takes, 0.05 or 0.02, as if the model were larger. So there is time
    to watch groups come and go; 0 trains as fast as it can."""

    join_delay_sec: float = field(default_factory=lambda: float(_env("JOIN_DELAY_SEC", "10", "2")))
    """``JOIN_DELAY_SEC``: how late group 0 of the live checkpoint recovery example joins, 10 or 2 seconds."""

    state_mb: float = field(default_factory=lambda: float(_env("STATE_MB", "0")))
    """``STATE_MB``: size in MB (10^6 bytes) of a frozen embedding table added to the model, so that the transfer of
    the state becomes visible. Frozen: it costs no allreduce."""

    batch_size: int = field(default_factory=lambda: int(_env("BATCH_SIZE", "32")))
    """``BATCH_SIZE``: examples a rank takes per step."""

    timeout_sec: float = field(default_factory=lambda: float(_env("TIMEOUT_SEC", "30")))
    """``TIMEOUT_SEC``: longest wait for a collective, a transfer or a vote."""

    metrics_file: str = field(default_factory=lambda: _env("METRICS_FILE", ""))
    """``METRICS_FILE``: where to append what happens, one JSON object a line. Empty: nowhere."""

    def total_steps(self) -> int:
        """Committed steps after which every group ends."""
        return int(Path(self.total[1:]).read_text() if self.total.startswith("@") else self.total)


def load_data(name: str) -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out examples: images float32 ``(n, channels, side, side)`` in 0..1, labels int64 ``(n,)``.

    Raises:
        ValueError: ``name`` is not a data set known here.
        ModuleNotFoundError: scikit-learn (``digits``) or torchvision (``cifar10``) is not installed.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(raw.target, dtype=torch.int64)
        # the same everywhere
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held_out, train = shuffled[:360], shuffled[360:]
        return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])
    if name == "cifar10":
        from torchvision.datasets import CIFAR10

        def tensors(train: bool) -> TensorDataset:
            data = CIFAR10(root=os.environ.get("DATA_DIR", "./cifar"), train=train, download=True)
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).to(torch.float32) / 255
            return TensorDataset(pixels, torch.tensor(data.targets, dtype=torch.int64))

        return tensors(train=True), tensors(train=False)
    raise ValueError(f"DATASET={name!r} is not known: digits or cifar10")


def batches(dataset: TensorDataset, sampler: Sampler[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, newly shuffled each epoch.

    Uses torchdata's StatefulDataLoader where it is installed. Its position (``loader.state_dict()``) belongs
    to this group and not to the model: save it with the checkpoints on disk, never send it to a peer.
    """
    warnings.filterwarnings("ignore", message=".*set_vital.*")  # of torchdata, about its own code
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader as DataLoader
    except ModuleNotFoundError:
        from torch.utils.data import DataLoader
    loader: Any = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)
    for epoch in itertools.count():
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        yield from loader


class Net(nn.Module):
    """Two convolutions and two linear layers, 38 thousand parameters on digits; plus a frozen table of
    ``state_mb`` MB.

    The table (if any) is a hash embedding: each 2 x 2 patch of the image, its pixels rounded to 16 levels,
    picks a random row of 64 numbers, and the mean of these rows is a further input of the classifier.
    """

    def __init__(self, image: torch.Size, classes: int = 10, state_mb: float = 0) -> None:
        super().__init__()
        channels, side, _ = image
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.rows = int(state_mb * 1e6) // (64 * 4)
        self.table = nn.Embedding(self.rows, 64).requires_grad_(False) if self.rows else None
        inputs = 32 * (side // 2) ** 2 + (64 if self.rows else 0)
        self.classifier = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(n, channels, side, side)`` to logits ``(n, classes)``."""
        features = self.convolutions(images).flatten(1)
        if self.table is not None:
            levels = (images[:, 0] * 15).long()
            patches = levels.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)  # (n, side^2 / 4, 4)
            codes = (patches * torch.tensor([1, 16, 256, 4096], device=images.device)).sum(-1)
            # A large odd factor spreads the 65536 codes over however many rows there are.
            features = torch.cat([features, self.table(codes * 2654435761 % self.rows).mean(1)], dim=1)
        logits: Tensor = self.classifier(features)
        return logits


@torch.no_grad()
def accuracy(model: nn.Module, held_out: TensorDataset, device: torch.device) -> float:
    """The share of the held-out examples that the model gets right, 0 to 1."""
    images, labels = held_out.tensors
    right = 0
    for x, y in zip(images.split(512), labels.split(512), strict=True):
        right += int((model(x.to(device)).argmax(1) == y.to(device)).sum())
    return right / len(labels)


def tensors_of(state: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a tree of dicts, lists and tuples, with its path, in an order that does not depend on the
    order in which a dict was filled."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from tensors_of(state[key], f"{path}/{key}")
    elif isinstance(state, (list, tuple)):
        for i, value in enumerate(state):
            yield from tensors_of(value, f"{path}/{i}")


def state_bytes(state: object) -> int:
    """The size of all tensors in the tree, bytes."""
    return sum(t.numel() * t.element_size() for _, t in tensors_of(state))


def state_hash(state: object) -> str:
    """xxh3-128 over path, type, shape and bytes of every tensor in the tree: equal hash, bit-identical state."""
    digest = xxhash.xxh3_128()
    for path, tensor in tensors_of(state):
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Metrics:
    """Appends events to a file, one JSON object a line: ``{"event": "step", "time": unix seconds, "pid": …, …}``.

    Each line goes out in one write, so it is whole even when the process is killed right after.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1) if path else None  # noqa: SIM115 - as long as the process

    def write(self, event: str, **values: object) -> None:
        if self._file is not None:
            line = {"event": event, "time": time.time(), "pid": os.getpid(), **values}
            self._file.write(json.dumps(line) + "\n")
