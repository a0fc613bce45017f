"""How our gRPC clients connect, and what their errors become.

Deadlines travel as gRPC timeouts and come back as ``TimeoutError``; everything else comes back as
``RuntimeError``. Both name the server, its address, the cause and what to try.
"""

from __future__ import annotations

import logging
import os
import weakref

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # before grpc: its own INFO lines are no user's business
# Its fork handlers give up while any thread is in a call, which ours always are, and say so at each fork. Children
# let go of our connections by torchft.runtime.fork; they must not use them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from torchft.runtime.deadline import Deadline
from torchft.runtime.fork import close_in_children
from torchft.runtime.net import parse_address
from torchft.runtime.retry import retry

__all__ = ["answered", "connect", "knock", "open_channel", "ping_times", "reason", "server_options", "translate"]

logger = logging.getLogger(__name__)

_SAY_AFTER = 5.0
"""Seconds of waiting for a server that does not answer, after which the log says so."""
_LAST_LOOK = 1.0
_MAX_MESSAGE = 64 * 1024 * 1024
_MAX_PENDING = 20_000
"""Calls that a server has not begun to serve yet. Beyond 1000 gRPC refuses some otherwise, drawn by chance; and
thousands of groups come in the same moment when a lighthouse is started again."""

_CLIENT_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # A server that comes back is found again within a second, not within gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Two clients of one address in one process do not share a connection, so one's trouble is not the other's.
    ("grpc.use_local_subchannel_pool", 1),
]

_NO_ANSWER = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

_SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    ("grpc.server.max_pending_requests", _MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent split of its clients
    # Other clients ping as often as they like: never answered with ENHANCE_YOUR_CALM.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1),
]


def ping_times(heartbeat_timeout: float) -> tuple[float, float]:
    """After how many seconds of silence the other end is pinged, and how long its answer may take.

    Whoever is stopped or unreachable is given up before ``heartbeat_timeout`` (seconds) has passed since its last sign.
    """
    return 0.2 * heartbeat_timeout, 0.7 * heartbeat_timeout


def _pings(times: tuple[float, float]) -> list[tuple[str, int]]:
    """C threads of the other end answer, which need no GIL."""
    silence, patience = (max(1, round(1000 * t)) for t in times)
    return [
        ("grpc.keepalive_time_ms", silence),
        ("grpc.keepalive_timeout_ms", patience),
        ("grpc.http2.ping_timeout_ms", patience),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(heartbeat_timeout: float) -> list[tuple[str, int]]:
    """For a server that ends the connections of clients that are stopped or unreachable: :func:`ping_times`."""
    return [*_SERVER_OPTIONS, *_pings(ping_times(heartbeat_timeout))]


def open_channel(address: str, pings: tuple[float, float] | None = None) -> grpc.Channel:
    """A channel to ``http://host:port``. Nothing is connected yet.

    Args:
        address: of the server.
        pings: while a call is under way, a server that was silent for the first number of seconds is pinged, and its
            connection ended when the answer takes longer than the second. None: it is waited for.

    Raises:
        ValueError: the address is not one.
    """
    target = parse_address(address)
    options = _CLIENT_OPTIONS
    if pings is not None:
        options = [*options, *_pings(pings)]
    channel = grpc.insecure_channel(target, options=options)
    # The port of any host: looking the name up here could take seconds, and gRPC does it again.
    weakref.finalize(channel, close_in_children(others=[int(target.rpartition(":")[2])]).forget)
    return channel


def connect(
    address: str, deadline: Deadline, *, what: str, hint: str, pings: tuple[float, float] | None = None
) -> grpc.Channel:
    """A channel that is connected. A server that is not there yet is waited for until the deadline.

    Args:
        address: ``http://host:port``.
        deadline: for the connection.
        what: the server's role in messages, for instance ``lighthouse``.
        hint: what a person can try when it does not answer.
        pings: as of :func:`open_channel`.

    Raises:
        TimeoutError: it did not answer in time.
        ValueError: the address is not one.
    """
    channel = open_channel(address, pings)
    try:
        if _connects(channel, Deadline(min(_SAY_AFTER, deadline.remaining()))):
            return channel
        why = _why_not(channel)
        if why and not deadline.expired:
            left = deadline.remaining()
            logger.warning(
                "the %s at %s does not answer yet (%s); it is tried for %.0f s more", what, address, why, left
            )
            why = "" if _connects(channel, deadline) else _why_not(channel)
        if not why:
            return channel
    except BaseException:
        channel.close()
        raise
    channel.close()
    raise TimeoutError(
        f"the {what} at {address} did not answer within {deadline.timeout:g} s of trying to connect ({why}). {hint}"
    )


def _connects(channel: grpc.Channel, deadline: Deadline) -> bool:
    try:
        retry(
            lambda: knock(channel, deadline.remaining()),
            deadline=deadline,
            retryable=lambda e: isinstance(e, grpc.Call) and e.code() == grpc.StatusCode.UNAVAILABLE,
        )
    except grpc.RpcError:
        return False
    return True


def _why_not(channel: grpc.Channel) -> str:
    """What came of the last try to connect: a call that waits for a server only learns that it waited too long. Empty:
    the server answers by now."""
    try:
        knock(channel, _LAST_LOOK, wait_for_ready=False)
    except grpc.RpcError as e:
        return reason(e)
    return ""


def knock(channel: grpc.Channel, timeout: float, wait_for_ready: bool = True) -> None:
    """Returns when a server answers.

    Args:
        channel: to it.
        timeout: seconds.
        wait_for_ready: a server that is not there yet is waited for.

    Raises:
        grpc.RpcError: it did not answer.
    """
    # A call of a method that no server has: any answer to it, refusal included, comes from a server. Watching the
    # channel's state instead takes gRPC's Python a fifth of a second.
    call = channel.unary_unary("/torchft.Connect/Knock", None, None)
    try:
        call(b"", timeout=timeout, wait_for_ready=wait_for_ready)
    except grpc.RpcError as e:
        if not answered(e):
            raise


def answered(error: grpc.RpcError) -> bool:
    """Whether a call failed by the word of a server, not because there was none."""
    return isinstance(error, grpc.Call) and error.code() not in _NO_ANSWER


def reason(error: grpc.RpcError) -> str:
    """The cause in words: the server's own message, or the transport's."""
    code = error.code() if isinstance(error, grpc.Call) else None
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return f"{code.name if code else 'error'}: {details or 'no details'}"


def translate(error: grpc.RpcError, *, what: str, address: str, call: str, timeout: float, hint: str) -> Exception:
    """The exception to raise for a failed call."""
    code = error.code() if isinstance(error, grpc.Call) else None
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return TimeoutError(
            f"{call} at the {what} {address} did not end within {timeout:g} s ({reason(error)}). {hint}"
        )
    if code == grpc.StatusCode.UNAVAILABLE:
        return RuntimeError(f"{call}: the {what} at {address} is not reachable ({reason(error)}). {hint}")
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return RuntimeError(f"{call}: the {what} at {address} refused the request ({reason(error)})")
    return RuntimeError(f"{call} failed at the {what} {address} ({reason(error)})")
