"""A checkpoint transport that any implementation of the interface can use: a state as files of a folder.

Tensors are `.npy` files, the tree around them is JSON. The metadata is the folder's path. A step's files are written
beside their place and renamed into it, so a receiver sees all of them or none.
"""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchft.checkpointing import CheckpointTransport


class FolderTransport(CheckpointTransport[Any]):
    """Offers states below ``folder``, which the receiver must be able to read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def metadata(self) -> str:
        return str(self._folder)

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        place = self._folder / f"step-{step}"
        if place.exists():
            return
        partial = self._folder / f"partial-{step}-{time.monotonic_ns()}"
        partial.mkdir()
        tensors: list[torch.Tensor] = []
        tree = _encode(state_dict, tensors)
        for i, tensor in enumerate(tensors):
            np.save(partial / f"{i}.npy", tensor.detach().numpy(), allow_pickle=False)
        (partial / "tree.json").write_text(json.dumps(tree))
        os.rename(partial, place)

    def disallow_checkpoint(self) -> None:
        """Files are copies: nothing to withdraw."""

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        place = Path(metadata) / f"step-{step}"
        end = time.monotonic() + timeout.total_seconds()
        while not place.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"{place} did not appear within {timeout}")
            time.sleep(0.01)
        return _decode(json.loads((place / "tree.json").read_text()), place)

    def shutdown(self, wait: bool = True) -> None:
        """The folder belongs to whoever made the run."""


def _encode(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _decode(tree: Any, place: Path) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return torch.from_numpy(np.load(place / f"{value}.npy", allow_pickle=False))
    if kind == "dict":
        return {k: _decode(v, place) for k, v in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_decode(v, place) for v in value)
    return value
