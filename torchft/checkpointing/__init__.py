"""Moving a live state from one replica group to another, and to disk and back.

Interface, format, HTTP and process-group transports; checkpoints on disk.
"""

from torchft.checkpointing.directory import DamagedCheckpoint
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.checkpointing.persistent import Checkpoints, Loaded, load_latest, save
from torchft.checkpointing.pg_transport import PGTransport
from torchft.checkpointing.transport import (
    CheckpointError,
    CheckpointTimeout,
    CheckpointTransport,
    IntegrityError,
    ManifestError,
    SourceLost,
    StepNotServed,
    TooSlow,
    TransferAborted,
    Unauthorized,
    UnsafeStateError,
)
from torchft.checkpointing.tree import register_dataclass

__all__ = [
    "CheckpointError",
    "CheckpointTimeout",
    "CheckpointTransport",
    "Checkpoints",
    "DamagedCheckpoint",
    "HTTPTransport",
    "IntegrityError",
    "Loaded",
    "ManifestError",
    "PGTransport",
    "SourceLost",
    "StepNotServed",
    "TooSlow",
    "TransferAborted",
    "Unauthorized",
    "UnsafeStateError",
    "load_latest",
    "register_dataclass",
    "save",
]
