"""An HTTP transport on loopback, and where it listens: what its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from torchft.checkpointing import HTTPTransport
from torchft.checkpointing.offer import Offer

__all__ = ["SHORT", "TIMEOUT", "address_of", "offered", "over_tcp", "port_of", "same", "transport"]

TIMEOUT = timedelta(seconds=60)
SHORT = timedelta(seconds=2)


@contextmanager
def transport(**options: Any) -> Iterator[HTTPTransport[Any]]:
    one: HTTPTransport[Any] = HTTPTransport(options.pop("timeout", TIMEOUT), hostname="127.0.0.1", **options)
    try:
        yield one
    finally:
        one.shutdown()


def port_of(source: HTTPTransport[Any]) -> int:
    return int(source.metadata().rpartition(":")[2])


def address_of(source: HTTPTransport[Any]) -> str:
    return source.metadata().rpartition("http://")[2]


def offered(source: HTTPTransport[Any]) -> Offer:
    current = source._server.current
    assert current is not None
    return current


def over_tcp(metadata: str) -> str:
    """What a receiver on another machine can use of a source's metadata."""
    return " ".join(word for word in metadata.split(" ") if not word.startswith("unix:"))


def same(got: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    """Whether all that was sent has come."""
    return all(torch.equal(got[name], tensor) for name, tensor in sent.items())
