"""What an HTTP source tells of itself: ``torchft-http/1 http://host:port …``, and what a receiver makes of it."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from torchft import config
from torchft.checkpointing.http_local import is_local
from torchft.checkpointing.transport import CheckpointError
from torchft.runtime.logs import SpeakerLogger
from torchft.runtime.net import advertised_host, format_address, parse_address, parse_addresses

__all__ = ["PROTOCOL", "addresses_in", "named_sources", "own_addresses"]

logger = SpeakerLogger("torchft.checkpointing.http_transport")

PROTOCOL = "torchft-http/1"


def own_addresses(hostname: str | None, port: int, toward: str | None = None) -> list[str]:
    """Where others find a port of this machine, the likeliest first. Arguments as of :class:`HTTPTransport`."""
    lighthouse = config.LIGHTHOUSE.read()
    if toward is None and lighthouse is not None:
        toward = parse_addresses(lighthouse)[0]
    hosts = [advertised_host(toward, hostname)]
    if not config.HOST.is_set() and hostname is None:
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError:
            pass  # nobody could be told this name
        else:
            hosts.append(name)
    return [format_address(h, port) for h in dict.fromkeys(hosts)]


def named_sources(sources: Sequence[tuple[int, str]]) -> list[tuple[str, list[str]]]:
    """The sources whose metadata can be read. Who speaks something else is passed over."""
    known: list[tuple[str, list[str]]] = []
    for rank, metadata in list(sources):
        try:
            known.append((f"replica rank {rank}", addresses_in(metadata)))
        except CheckpointError as e:
            known.append((f"replica rank {rank}", []))
            logger.debug("replica rank %d: %s", rank, e)
    return known


def addresses_in(metadata: str) -> list[str]:
    """The addresses that a source's metadata names.

    Raises:
        CheckpointError: it is another transport's, or damaged.
    """
    protocol, *addresses = metadata.split(" ")
    if protocol != PROTOCOL:
        family = PROTOCOL.partition("/")[0]
        spoken = protocol if protocol.startswith(f"{family}/") else f"something else ({metadata[:80]!r})"
        raise CheckpointError(
            f"the source does not speak {PROTOCOL} but {spoken}: give all replica groups the same transport and the "
            "same version of torchft"
        )
    if not 0 < len(addresses) <= 16:
        raise CheckpointError(f"the source's metadata names no usable address: {metadata[:80]!r}")
    try:
        for address in addresses:
            if not is_local(address):
                parse_address(address)
    except ValueError as e:
        raise CheckpointError(f"the source's metadata names no usable address: {e}") from e
    return addresses
