"""A small language model of characters, on text that ships with Python. Nothing about fault tolerance.

The text is the documentation that the interpreter prints for ``help("if")`` and its like: 460 thousand characters of
real English with code in it, no download. The model is a transformer of two blocks, 120 thousand parameters, small
enough for some ten steps a second on one core. Its last tenth is held out; what is reported on it is the loss in bits
per character: 6.6 for a model that knows nothing of 95 characters, below 3 within some hundred steps.

As in :mod:`examples.digits` the model has nothing that depends on one group's batch, so equal states stay equal.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from examples.digits import Settings

__all__ = [
    "CONTEXT",
    "VOCABULARY",
    "CharacterModel",
    "LocalSettings",
    "bits_per_character",
    "load_text",
    "loss_of",
    "windows",
]

CONTEXT = 64
"""Characters that the model sees at most."""
VOCABULARY = 96
"""The printable ASCII characters; a line's end counts as one, and so does whatever else there is."""


@dataclass(frozen=True)
class LocalSettings(Settings):
    """Settings of the examples that communicate rarely; ``TOTAL_STEPS`` counts steps of the inner optimizer here."""

    sync_every: int = field(default_factory=lambda: int(os.environ.get("SYNC_EVERY") or 20))
    """``SYNC_EVERY``: inner steps from one synchronisation to the next, 20."""

    fragments: int = field(default_factory=lambda: int(os.environ.get("FRAGMENTS") or 1))
    """``FRAGMENTS``: parts of the model that are synchronised at times of their own (Streaming DiLoCo), 1 to 4."""

    sync_delay: int = field(default_factory=lambda: int(os.environ.get("FRAGMENT_SYNC_DELAY") or 0))
    """``FRAGMENT_SYNC_DELAY``: inner steps during which a synchronisation travels, 0."""

    update_alpha: float = field(default_factory=lambda: float(os.environ.get("FRAGMENT_UPDATE_ALPHA") or 0))
    """``FRAGMENT_UPDATE_ALPHA``: share of a group's own parameters in what it goes on from, 0."""

    quantize: bool = field(default_factory=lambda: os.environ.get("QUANTIZE", "0") not in ("", "0"))
    """``QUANTIZE``: synchronise with one byte an element."""


def load_text() -> tuple[Tensor, Tensor]:
    """Training and held-out text: uint8 ``(n,)``, numbers below :data:`VOCABULARY`."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8)
    numbers = torch.where((codes >= 32) & (codes < 127), codes - 31, torch.zeros_like(codes))
    held_out = len(numbers) // 10
    return numbers[:-held_out], numbers[-held_out:]


def windows(text: Tensor, group: int, groups: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of pieces of a group's own share of the text: inputs and targets, both int64
    ``(batch_size, CONTEXT)``.

    A group that is started again draws other pieces than in its life before.
    """
    share = len(text) // groups
    mine = text[group * share : (group + 1) * share].long()
    generator = torch.Generator().manual_seed((group << 32) + os.getpid())
    span = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(mine) - CONTEXT, (batch_size, 1), generator=generator) + span
        yield mine[starts], mine[starts + 1]


class Block(nn.Module):
    """Attention to what came before, and a feed-forward layer; both added to their input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(n, length, width))
        return cast(Tensor, x + self.mlp(self.before_mlp(x)))


class Embedding(nn.Module):
    """A character and its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.character = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(CONTEXT, width)

    def forward(self, characters: Tensor) -> Tensor:
        places = torch.arange(characters.shape[1], device=characters.device)
        return cast(Tensor, self.character(characters) + self.place(places))


class CharacterModel(nn.Sequential):
    """Characters int64 ``(n, length <= CONTEXT)`` to logits of the next one ``(n, length, VOCABULARY)``."""

    def __init__(self, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))
        super().__init__(Embedding(width), *(Block(width, heads) for _ in range(blocks)), head)

    def fragments(self, count: int) -> list[nn.Module]:
        """The model cut into ``count`` parts, first layers first.

        Raises:
            ValueError: it has fewer layers.
        """
        layers = list(self)
        if not 1 <= count <= len(layers):
            raise ValueError(f"FRAGMENTS={count}: the model has {len(layers)} layers to be divided")
        cuts = [len(layers) * i // count for i in range(count + 1)]
        return [nn.ModuleList(layers[a:b]) for a, b in itertools.pairwise(cuts)]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next character, in nats."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits_per_character(model: nn.Module, held_out: Tensor, pieces: int = 256) -> tuple[float, float]:
    """Loss in bits, and the share of characters that the model guesses right, on the same pieces in every run."""
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, pieces).long()[:, None] + torch.arange(CONTEXT)
    text = held_out.long()
    loss, right = 0.0, 0
    for inputs, targets in zip(text[starts].split(32), text[starts + 1].split(32), strict=True):
        logits = model(inputs)
        loss += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
    return loss / math.log(2) / starts.numel(), right / starts.numel()
