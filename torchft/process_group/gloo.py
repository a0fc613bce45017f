"""Collectives over TCP with torch's gloo backend.

Members meet under the prefix of the store address exactly as a plain ``ProcessGroupGloo`` over a
``PrefixStore(prefix, TCPStore)`` would: no keys of our own, so that other implementations may be members.

Gloo works on CPU tensors. Its abort does nothing; :mod:`torchft.process_group.sockets` says what we do instead.
"""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo as TorchGloo

from torchft.process_group.backend import BackendProcessGroup, Session, torch_group
from torchft.process_group.rendezvous import RendezvousStore
from torchft.process_group.sockets import DeviceAddress, device_address, shut_down_connections

__all__ = ["ProcessGroupGloo"]

logger = logging.getLogger(__name__)


class ProcessGroupGloo(BackendProcessGroup):
    """A reconfigurable group on gloo.

    The interface to use is ``GLOO_SOCKET_IFNAME``'s, or the one that the host name resolves to.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.
    """

    def getBackendName(self) -> str:
        return "torchft-gloo"

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        assert session.store is not None
        backend = TorchGloo(session.store, rank, world_size, timeout)
        group = torch_group(backend, dist.ProcessGroup.BackendType.GLOO, "cpu", rank, world_size)
        own, others = _devices(session.store, rank, world_size)
        if not own:
            logger.warning(
                "%s: gloo published its addresses in a form that is not known: an abort cannot end pending "
                "collectives, they wait for their timeout",
                session.name,
            )
        session.cut = lambda: _cut(own, others)
        if session.aborted.is_set():
            session.cut()
        return group


def _cut(own: list[DeviceAddress], others: list[DeviceAddress]) -> None:
    count = shut_down_connections(own, others)
    logger.debug("shut down %d gloo connections", count)


def _devices(store: RendezvousStore, rank: int, world_size: int) -> tuple[list[DeviceAddress], list[DeviceAddress]]:
    """The addresses of our devices and of the other members', one for each network interface in use."""
    own: list[DeviceAddress] = []
    others: list[DeviceAddress] = []
    context = 0
    while store.check([f"{context}/{rank}"]):
        published = store.multi_get([f"{context}/{r}" for r in range(world_size)])
        for member, value in enumerate(published):
            address = device_address(value)
            if address is not None:
                (own if member == rank else others).append(address)
        context += 1
    return own, others
