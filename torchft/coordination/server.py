"""A gRPC server on the process's background loop: what the lighthouse's and the manager's have in common.

It is started and stopped from ordinary threads; its handlers are coroutines. Stopping is idempotent, ends the
calls that wait, and is done at interpreter exit for servers whose owner forgot it.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable

import grpc
import grpc.aio

from torchft.coordination.channel import server_options
from torchft.runtime import loop
from torchft.runtime.fork import close_in_children
from torchft.runtime.net import format_address, split_bind

__all__ = ["GrpcServer"]

_live: weakref.WeakSet[GrpcServer] = weakref.WeakSet()


class GrpcServer:
    """Binds at once; raises if that is not possible.

    Args:
        bind: ``host:port``; port 0 takes any free one, ``[::]`` listens on IPv4 and IPv6.
        register: adds the services to the server.
        what: the server's role in messages.
        heartbeat_timeout: seconds after which the connection of a client that does not answer is ended.

    Raises:
        ValueError: ``bind`` is not ``host:port``.
        RuntimeError: the port is taken, or the address is not one of this machine.
    """

    def __init__(
        self, bind: str, register: Callable[[grpc.aio.Server], None], what: str, heartbeat_timeout: float = 5.0
    ) -> None:
        self._host, port = split_bind(bind)
        self._stopped = False
        self._server, self.port = loop.submit(self._start(port, register, what, heartbeat_timeout)).result(timeout=60)
        self._in_children = close_in_children(own=[self.port])
        _live.add(self)

    async def _start(
        self, port: int, register: Callable[[grpc.aio.Server], None], what: str, heartbeat_timeout: float
    ) -> tuple[grpc.aio.Server, int]:
        _hold_grpc()
        server = grpc.aio.server(options=server_options(heartbeat_timeout))
        register(server)
        hosts = [self._host]
        if self._host == "::":
            hosts.append("0.0.0.0")  # a machine without IPv6
        cause: Exception | None = None
        for host in hosts:
            try:
                bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            except RuntimeError as e:
                cause = e
                continue
            if bound:
                await server.start()
                return server, bound
        where = format_address(self._host, port).removeprefix("http://")
        raise RuntimeError(
            f"the {what} cannot listen on {where}: the port is in use or the address is not one of this machine. "
            f"Choose another port (0 takes any free one), or stop what listens there."
        ) from cause

    @property
    def bound_host(self) -> str | None:
        """The host it is bound to, None when that is every interface."""
        return None if self._host in ("::", "0.0.0.0") else self._host

    def stop(self, grace: float = 0.0) -> None:
        """Ends the server: calls get ``grace`` seconds, then they are cancelled."""
        if self._stopped:
            return
        self._stopped = True
        _live.discard(self)
        self._in_children.forget()
        if loop.on_loop():
            raise RuntimeError("a server cannot be stopped from the loop it runs on")
        loop.submit(self._server.stop(grace)).result(timeout=grace + 60)


@functools.cache
def _hold_grpc() -> None:
    """Keeps gRPC's poller for asyncio alive when the last server is gone.

    Without it the poller is torn down while the loop may still look at its socket, and "Bad file descriptor" is
    logged (grpc/grpc issue 22365).
    """
    grpc.aio.init_grpc_aio()  # type: ignore[attr-defined]


def _stop_all() -> None:
    for server in list(_live):
        server.stop()


atexit.register(_stop_all)
