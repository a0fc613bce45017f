"""What the parts of the transport suite share: a pair of transports, a transfer between them, equality to the bit."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from torchft.checkpointing.mesh import MeshSpec
from torchft.checkpointing.transport import CheckpointTransport, UnsafeStateError

__all__ = ["PLENTY", "SHORT", "Pair", "State", "TransportPair", "assert_same", "expect", "transfer"]

PLENTY = timedelta(seconds=60)
SHORT = timedelta(seconds=2)
"""Of which a source has a second to refuse, and a receiver another one to hear it."""
State = Any


@dataclass
class Pair:
    """A source (replica rank 0) and a receiver (replica rank 1) that can talk to each other."""

    source: CheckpointTransport[State]
    receiver: CheckpointTransport[State]
    lose_source: Callable[[], None]
    """Ends the source as its death would: connections break."""
    corrupt: Callable[[], None]
    """Damages a byte of what the source sends from here on, after it was hashed. Called from the receiver's
    ``state_dict``: before it reads the data, maybe before the source has any; in that case it may wait for it."""
    close: Callable[[], None]


def assert_same(want: object, got: object, path: str = "state") -> None:
    """Equal types, values to the bit, dtypes, shapes and strides.

    Raises:
        AssertionError: naming the path.
    """
    if isinstance(want, DTensor):
        assert isinstance(got, DTensor), path
        assert want.placements == got.placements, path
        assert want.shape == got.shape, path
        assert MeshSpec.of(want.device_mesh) == MeshSpec.of(got.device_mesh), path
        assert_same(want.to_local(), got.to_local(), f"{path} (local)")
    elif isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), path
        assert (want.dtype, want.shape, want.stride()) == (got.dtype, got.shape, got.stride()), path
        assert _bits(want) == _bits(got), f"{path}: values differ"
    elif isinstance(want, dict):
        assert type(want) is type(got), path
        assert isinstance(got, dict)
        assert list(want) == list(got), f"{path}: keys or their order differ"
        if isinstance(want, defaultdict) and isinstance(got, defaultdict):
            assert want.default_factory is got.default_factory, path
        for key, value in want.items():
            assert_same(value, got[key], f"{path}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert type(want) is type(got), path
        assert isinstance(got, (list, tuple))
        assert len(want) == len(got), path
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert type(want) is type(got), path
        assert want == got or (want != want and got != got), f"{path}: {want!r} != {got!r}"  # nan


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def transfer(pair: Pair, state: State, step: int = 3, timeout: timedelta = PLENTY, ask: int | None = None) -> State:
    """Sends at the source and receives at the receiver, at the same time.

    Args:
        pair: of transports.
        state: sent.
        step: of the state.
        timeout: for the receiver.
        ask: the step that the receiver asks for; by default ``step``.

    Raises:
        Exception: the receiver's, else the source's.
    """
    failures: list[BaseException] = []

    def send() -> None:
        try:
            pair.source.send_checkpoint([1], step, state, PLENTY)
        except Exception as e:
            failures.append(e)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        metadata = pair.source.metadata()
        received = pair.receiver.recv_checkpoint(0, metadata, step if ask is None else ask, timeout)
    except BaseException:
        pair.lose_source()
        sender.join(60)
        if failures and isinstance(failures[0], UnsafeStateError):
            raise failures[0] from None
        raise
    sender.join(60)
    assert not sender.is_alive(), "the source did not return"
    pair.source.disallow_checkpoint()
    if failures:
        raise failures[0]
    return received


def expect(error: type[BaseException] | tuple[type[BaseException], ...], run: Callable[[], object]) -> str:
    try:
        run()
    except error as e:
        return str(e)
    raise AssertionError(f"{error} was expected")


class TransportPair(ABC):
    """The tests. Bound to pytest only by the names of its methods."""

    @abstractmethod
    def open(self, into: Callable[[], State] | None = None, allow_pickle: bool = False) -> Pair:
        """A fresh pair.

        Args:
            into: the receiver's ``state_dict``.
            allow_pickle: of both.
        """

    def round_trip(self, state: State, into: Callable[[], State] | None = None) -> State:
        """Moves a state over a fresh pair and checks that it arrives as it was."""
        pair = self.open(into)
        try:
            received = transfer(pair, state)
            assert_same(state, received)
            return received
        finally:
            pair.close()
