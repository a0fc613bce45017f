"""Collectives over TCP with torch's gloo backend.

Members meet under the prefix of the store address exactly as a plain ``ProcessGroupGloo`` over a
``PrefixStore(prefix, TCPStore)`` would: no keys of our own, so that other implementations may be members.

Gloo works on CPU tensors. Its abort does nothing; :mod:`torchft.process_group.sockets` says what we do instead.
"""

from __future__ import annotations

import logging
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo as TorchGloo

from torchft import config
from torchft.process_group.backend import BackendProcessGroup, torch_group
from torchft.process_group.devices import Devices
from torchft.process_group.rendezvous import split_store_address
from torchft.process_group.session import Session
from torchft.runtime.net import format_address, is_loopback, leads_elsewhere, local_address_toward

__all__ = ["ProcessGroupGloo"]

logger = logging.getLogger(__name__)


class ProcessGroupGloo(BackendProcessGroup):
    """A reconfigurable group on gloo.

    The interface to use is ``GLOO_SOCKET_IFNAME``'s, or the one that the host name resolves to; where that is loopback
    and the store is on another machine, the one that routes to the store.

    Args:
        timeout: the longest wait of a configuration and of each collective. Default 60 s.
    """

    _loses_works = True

    def getBackendName(self) -> str:
        return "torchft-gloo"

    def _open(
        self, session: Session, rank: int, world_size: int, timeout: timedelta, global_ranks: list[int] | None
    ) -> dist.ProcessGroup:
        assert session.store is not None
        devices = Devices(rank, world_size)
        session.forget = devices.forget
        session.store.seen = devices.learn
        # torch 2.13 gives each backend an ``abort``, which gloo's inherits and which does nothing: that it is there
        # proves nothing. Where a later gloo has one that ends its waits, it belongs here, beside ``devices.cut``.
        session.cut = devices.cut
        try:
            address = _routed_address(session.store.address)
            if address is None:
                backend = TorchGloo(session.store, rank, world_size, timeout)
            else:
                backend = TorchGloo(session.store, rank, world_size, _options(address, timeout))
        finally:
            devices.built()
        devices.unpace()
        group = torch_group(backend, dist.ProcessGroup.BackendType.GLOO, "cpu", rank, world_size)
        if not devices.own:
            logger.warning(
                "%s: gloo published its addresses in a form that is not known: an abort cannot end pending "
                "collectives, they wait for their timeout",
                session.name,
            )
        if session.aborted.is_set():
            session.cut()
        return group


def _routed_address(store_addr: str) -> str | None:
    """The address to listen on, where gloo would choose a loopback one, which is of no use to members elsewhere.

    Many systems have their host name in /etc/hosts as 127.0.1.1. None: gloo chooses.
    """
    if config.GLOO_SOCKET_IFNAME.is_set():
        return None
    host, port, _ = split_store_address(store_addr)
    if is_loopback(host) or leads_elsewhere(socket.gethostname()):
        return None
    return local_address_toward(format_address(host, port))


def _options(address: str, timeout: timedelta) -> Any:
    options = TorchGloo._Options()  # type: ignore[attr-defined]
    options._devices = [TorchGloo.create_device(hostname=address)]
    options._threads = 2  # as many as by default
    options._timeout = timeout
    return options
