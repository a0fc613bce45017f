"""One of the sources of a fetch: where it is, whether it answers, what it has announced.

States: *idle* (not asked yet) → *opening* (connecting, waiting for its manifest) → *ready* → and from anywhere *out*
(lost, refused, or not believed: the reason is kept for the messages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torchft.checkpointing.chunks import Seal
from torchft.checkpointing.http_client import OneOffer, SourceConnection
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTimeout,
    SourceLost,
    StepNotServed,
    Unauthorized,
)
from torchft.runtime.tracebacks import without_frames

__all__ = ["VERDICT", "HTTPSource", "failure_of"]


@dataclass(eq=False)
class HTTPSource:
    """A source, as the fetch sees it."""

    index: int
    """Its place among the sources: the assigned one is 0."""
    name: str
    """For messages."""
    addresses: Sequence[str]
    state: str = "idle"
    why: CheckpointError | None = None
    """Why it is out."""
    opened: float = 0.0
    """When it was asked for its manifest."""
    failures: int = 0
    """Connections lost since a chunk came from it."""
    address: str = ""
    """The one that answered."""
    offered: OneOffer = field(default_factory=OneOffer)
    """What its answers are of."""
    first: SourceConnection | None = None
    """On which the manifest came, for the first worker."""
    seal: Seal | None = None
    """Its hashes of all chunks, when asked for and there."""
    asked_for_seal: float | None = None
    """When."""
    seal_took: float = 0.0
    """Seconds until it was there."""
    workers: dict[int, SourceConnection] = field(default_factory=dict)
    closed: int = 0
    """Bytes that came on connections that are closed."""

    @property
    def usable(self) -> bool:
        return self.state == "ready"

    @property
    def received(self) -> int:
        """Bytes of data, on all connections."""
        return self.closed + sum(c.received for c in self.workers.values())

    def end(self, why: CheckpointError) -> None:
        """It is out. Its connections are cut."""
        if self.state != "out":
            self.state, self.why = "out", without_frames(why, contexts=True)
        for connection in self.workers.values():
            connection.cut()

    def __str__(self) -> str:
        return f"{self.name} ({self.address or ', '.join(self.addresses)})"


def failure_of(sources: Sequence[HTTPSource], step: int) -> CheckpointError:
    """What a fetch fails with whose sources are all out."""
    reasons = [s.why for s in sources if s.why is not None]
    if len(sources) == 1:
        return type(reasons[0])(f"{sources[0].name}: {reasons[0]}")
    kind = SourceLost
    for kinds in ((CheckpointTimeout,), (StepNotServed, Unauthorized), (Unauthorized,)):
        if all(isinstance(r, kinds) for r in reasons):
            kind = kinds[0]  # type: ignore[assignment]
    told = "; ".join(f"{s.name}: {s.why}" for s in sources)
    return kind(f"no source of step {step} is left. {told}")


VERDICT = (
    "its state differs, which is a silent corruption, unless the groups' states are not alike on purpose "
    "(docs/transfer.md). It is not used; look at that machine's memory"
)
"""What is said of a source that most others contradict."""
