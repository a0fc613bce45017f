"""The gloo devices of a group: known as they pass through the store, ended by an abort, closed in children.

The idea
    Gloo connects member after member. To one it opens the connection itself; for the connection of another it
    waits, and there is no socket yet that could be shut down. But our own device listens already, and whoever comes
    there with the number of a member is taken for it. So, to end such a wait, we connect to our own device in the
    stead of each member, and hang up. Gloo then finds a connection that has ended.

Rules
    1. Addresses are learnt from what gloo writes and reads while it builds, so an abort can come at any moment.
    2. Devices are called only while they are being built: later their port may be another's.
    3. A wait that neither ends (gloo opens a connection to a host that is silent) is left to
       :mod:`torchft.process_group.build`.
"""

from __future__ import annotations

import logging
import socket
import struct

from torchft.process_group.sockets import (
    DeviceAddress,
    device_address,
    pair_identifiers,
    shut_down_connections,
    unpace_connections,
)
from torchft.runtime.fork import close_in_children

__all__ = ["Devices"]

logger = logging.getLogger(__name__)

_CALL_TIMEOUT = 0.1  # seconds to connect to a listening socket of our own


class Devices:
    """The devices of one configuration.

    Args:
        rank: the caller's.
        world_size: number of members.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.own: tuple[DeviceAddress, ...] = ()
        """Ours, one for each network interface in use."""
        self.others: tuple[DeviceAddress, ...] = ()
        """The other members'."""
        self._rank = rank
        self._world_size = world_size
        self._doors: dict[DeviceAddress, list[int]] = {}
        self._building = True
        self._registration = close_in_children()

    def learn(self, key: str, value: bytes) -> None:
        """Takes note of a device published under ``<context>/<rank>``; other keys are ignored."""
        context, _, member = key.rpartition("/")
        address = device_address(value) if context.isdigit() and member.isdigit() else None
        if address is None:
            return
        if int(member) != self._rank:
            self.others = (*self.others, address)
            self._registration.add(others=[address])
        elif address not in self.own:
            self._doors = {**self._doors, address: pair_identifiers(value, self._world_size)}
            self.own = (*self.own, address)
            self._registration.add(own=[address])

    def built(self) -> None:
        """They are built, or never will be."""
        self._building = False

    def unpace(self) -> None:
        """All are connected: those connections that stay on this machine are not to be held back."""
        count = unpace_connections(self.own, self.others)
        if count:
            logger.debug("%d gloo connections on this machine are not paced", count)

    def cut(self) -> None:
        """Ends what waits for other members, at once."""
        count = shut_down_connections(self.own, self.others)
        logger.debug("shut down %d gloo connections", count)
        for address, identifiers in self._doors.items():
            for member, identifier in enumerate(identifiers):
                if member != self._rank and not (self._building and _call(address, identifier)):
                    break

    def forget(self) -> None:
        """They are gone."""
        self._registration.forget()


def _call(address: DeviceAddress, identifier: int) -> bool:
    try:
        with socket.create_connection(address, timeout=_CALL_TIMEOUT) as connection:
            connection.sendall(struct.pack("=q", identifier))
    except OSError as e:
        logger.debug("could not connect to our own device %s: %s", address, e)
        return False
    return True
