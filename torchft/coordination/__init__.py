"""Servers and clients of the control protocol: gRPC shells around ``torchft.core``. Imports no torch."""

from torchft.coordination.lighthouse_client import LighthouseClient
from torchft.coordination.lighthouse_server import LighthouseServer
from torchft.coordination.manager_client import ManagerClient
from torchft.coordination.manager_server import ManagerServer
from torchft.coordination.types import FailureNotification, Quorum, QuorumMember, QuorumResult

__all__ = [
    "FailureNotification",
    "LighthouseClient",
    "LighthouseServer",
    "ManagerClient",
    "ManagerServer",
    "Quorum",
    "QuorumMember",
    "QuorumResult",
]
