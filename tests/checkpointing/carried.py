"""A state that goes through its wire form, and where it arrives: what tests of manifests and destinations share."""

from __future__ import annotations

from torchft.checkpointing.description import describe
from torchft.checkpointing.destination import Destination
from torchft.checkpointing.manifest import Manifest

__all__ = ["carry"]


def carry(state: object, into: object | None = None) -> tuple[Destination, object]:
    """Where its bytes went, and the state as the receiver has it then.

    Args:
        state: what is sent.
        into: the receiver's own tensors.
    """
    manifest, sources = describe(state)
    destination = Destination(Manifest.parse(manifest.body), into)
    data = b"".join(bytes(s.view()) for s in sources)
    for view in destination.run.views(0, manifest.total):
        view[:], data = data[: len(view)], data[len(view) :]
    return destination, destination.finish()
