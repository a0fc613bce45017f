"""Moving a live state from one replica group to another: interface, format, HTTP and process-group transports."""

from torchft.checkpointing.http_transport import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTimeout,
    CheckpointTransport,
    IntegrityError,
    ManifestError,
    SourceLost,
    StepNotServed,
    TransferAborted,
    UnsafeStateError,
)
from torchft.checkpointing.tree import register_dataclass

__all__ = [
    "CheckpointError",
    "CheckpointTimeout",
    "CheckpointTransport",
    "HTTPTransport",
    "IntegrityError",
    "ManifestError",
    "PGTransport",
    "SourceLost",
    "StepNotServed",
    "TransferAborted",
    "UnsafeStateError",
    "register_dataclass",
]
