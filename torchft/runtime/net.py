"""Addresses: how one is written, and which one of ours others should be told."""

from __future__ import annotations

import ipaddress
import logging
import socket

from torchft import config

__all__ = [
    "advertised_host",
    "format_address",
    "host_as_told",
    "is_loopback",
    "leads_elsewhere",
    "local_address_toward",
    "parse_address",
    "parse_addresses",
    "resolves",
    "split_bind",
]

logger = logging.getLogger(__name__)

_ANYWHERE = "192.0.2.1:9"
"""An address of the block for documentation (RFC 5737): the way there is the default route. Nothing is sent."""


def parse_address(address: str) -> str:
    """``http://host:port/`` or ``host:port`` as ``host:port``.

    Raises:
        ValueError: there is no host or no port in it.
    """
    text = address.strip()
    for scheme in ("http://", "grpc://"):
        text = text.removeprefix(scheme)
    text = text.rstrip("/")
    host, colon, port = text.rpartition(":")
    if not colon or not host or not _is_number(port) or not 0 < int(port) < 65536 or "/" in text:
        raise ValueError(f"{address!r} is not an address: expected http://host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{address!r} is not an address: an IPv6 host is written [::1]:port")
    return text


def parse_addresses(addresses: str) -> tuple[str, ...]:
    """``http://a:1,b:2`` as ``("http://a:1", "http://b:2")``: in that order, each one once.

    Raises:
        ValueError: there is none, or one of them has no host or no port.
    """
    parsed = dict.fromkeys(f"http://{parse_address(text)}" for text in addresses.split(",") if text.strip())
    if not parsed:
        raise ValueError(f"{addresses!r} is not an address: expected http://host:port, or several with commas between")
    return tuple(parsed)


def format_address(host: str, port: int) -> str:
    """``http://host:port``, with brackets around an IPv6 host."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def split_bind(bind: str) -> tuple[str, int]:
    """``[::]:29510``, ``0.0.0.0:0`` or ``:29510`` as host and port; no host means all interfaces.

    Raises:
        ValueError: there is no port in it.
    """
    host, colon, port = bind.removeprefix("http://").rpartition(":")
    if not colon or not _is_number(port) or int(port) > 65535:
        raise ValueError(
            f"{bind!r} is not a bind address: expected host:port, for instance [::]:29510, with a port up to 65535"
        )
    return host.strip("[]") or "::", int(port)


def advertised_host(toward: str | None = None, given: str | None = None) -> str:
    """The address of this machine that others are told.

    In this order: ``TORCHFT_HOST``; ``given``, if it resolves; the local end of the route to ``toward``
    (``host:port``), or of the default route; the host name, if it resolves; the loopback address, with a warning.

    An address comes before a name: a name that only this machine knows is no use to others, and one that has to be
    looked up can cost every new connection seconds.
    """
    configured = config.HOST.read()
    if configured:
        return configured
    if given and resolves(given):
        return given
    routed = local_address_toward(toward or _ANYWHERE)
    if routed:
        return routed
    name = socket.gethostname()
    if resolves(name):
        return name
    logger.warning(
        "this machine's host name %r does not resolve and no route is known: telling others 127.0.0.1, which "
        "only works on one machine. Set TORCHFT_HOST to an address that the other machines reach.",
        name,
    )
    return "127.0.0.1"


def host_as_told(host: str, toward: str | None = None, given: str | None = None) -> str:
    """The host under which others find what this process finds at ``host``.

    Launchers tell a process ``127.0.0.1`` or the name of its own machine (torchrun does), which on another machine is
    that one, or nobody. So where ``host`` is a loopback address, or this machine's own name, others are told
    :func:`advertised_host`, unless that is a loopback address, too. Any other was chosen by somebody and is kept; in
    place of a name of this machine in another network others are told its address there.

    Args:
        host: a name or an address, without a port.
        toward, given: as of :func:`advertised_host`.
    """
    if not _is_here(host):
        return host
    chosen = next((a for a in _addresses_of(host) if not _loops(a) and _is_ours(a)), None)
    if chosen is not None and not _is_own_name(host):
        return chosen
    told = advertised_host(toward, given)
    return host if is_loopback(told) else told


def _is_own_name(host: str) -> bool:
    """Whether it is what this machine calls itself, with or without the domain."""
    return any(
        host.lower() in (own, own.partition(".")[0]) for own in map(str.lower, (socket.gethostname(), socket.getfqdn()))
    )


def is_loopback(host: str) -> bool:
    """Whether a name or an address leads to whichever machine asks. One that leads nowhere does not."""
    found = _addresses_of(host)
    return bool(found) and all(map(_loops, found))


def leads_elsewhere(host: str) -> bool:
    """Whether a name or an address leads to the same machine from everywhere."""
    return not all(map(_loops, _addresses_of(host)))


def resolves(host: str) -> bool:
    """Whether a name or an address leads anywhere."""
    return bool(_addresses_of(host))


def local_address_toward(address: str) -> str | None:
    """The address of this machine from which packets to ``host:port`` go; None: there is no way. Nothing is sent."""
    host, _, port = parse_address(address).rpartition(":")
    try:
        candidates = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, proto, _, sockaddr in candidates:
        try:
            with socket.socket(family, kind, proto) as s:
                s.connect(sockaddr)  # a datagram socket: this only asks the routing table
                local = str(s.getsockname()[0])
        except OSError:
            continue
        if not ipaddress.ip_address(local.partition("%")[0]).is_unspecified:
            return local
    return None


def _is_here(host: str) -> bool:
    """Whether it is a loopback address, or a name that leads to this machine."""
    try:
        return _loops(host.strip("[]"))
    except ValueError:
        return any(_is_ours(address) for address in _addresses_of(host))


def _loops(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _addresses_of(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter: a name with a part of more than 63 characters, or of none
        return []
    return [str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found]


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.bind((address, 0))
    except OSError:
        return False
    return True


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
