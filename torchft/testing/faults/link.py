"""A network that can be broken: a TCP proxy between a client and a server.

The client connects to :attr:`Link.address` instead of the server's own address; whatever speaks TCP passes: gRPC, HTTP,
a store. What was done to the link holds for all its connections, in both directions, until it is undone.

Rules:

- Each method has its effect when it returns. Effects are independent of each other and add up: a link can be late,
  slow and blocked at once. :meth:`Link.restore` undoes all.
- Bytes are never lost, changed or reordered in a connection that lives: blocking holds them back.
- An end of stream passes as one, a reset as a reset; both are as late as data.
- The address stays the link's own until :meth:`Link.close`, even while connections to it are refused.
- The proxy has a thread and an event loop of its own, not the process's loop: a network does not stand still because
  one of those who use it does.

What a proxy cannot do: the kernel accepts connections for it, so a client of a blocked link is connected and then hears
nothing, where a black hole in a real network would leave it connecting.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from torchft.runtime.net import parse_address
from torchft.testing.faults.announcing import announce
from torchft.testing.faults.link_connection import Weather, carry, reset

__all__ = ["Link"]

T = TypeVar("T")
_logger = logging.getLogger("torchft.testing.faults")
_CONTROL_TIMEOUT = 10.0


class Link:
    """A proxy in front of one address. A context manager; leaving it closes it.

    Args:
        target: where connections go to, ``host:port`` or ``http://host:port``. It need not be there yet: a connection
            made while it is not is reset.
        host: address to listen on.
        port: to listen on; 0: any free one.
        name: in logs; the target by default.

    Raises:
        ValueError: ``target`` is not an address.
        OSError: host and port cannot be listened on.
    """

    def __init__(self, target: str, *, host: str = "127.0.0.1", port: int = 0, name: str | None = None) -> None:
        address, _, number = parse_address(target).rpartition(":")
        self._target = (address.strip("[]"), int(number))
        self.name = name or f"link to {target}"
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Bound and never listening: it keeps the port ours while connections are refused.
        self._guard = self._bound((host, port))
        self._host, self._port = self._guard.getsockname()[:2]
        self._closed = False
        self._listener: socket.socket | None = None
        self._carrying: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torchft-link", daemon=True)
        self._thread.start()
        try:
            self._weather = self._on_loop(Weather)
            self._on_loop(self._listen)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------- what people use

    @property
    def address(self) -> str:
        """``host:port`` that clients connect to."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._carrying)

    @property
    def closed(self) -> bool:
        return self._closed

    def cut(self) -> None:
        """Resets (RST) all present connections at both ends. New ones are accepted."""
        announce("cut", self.name)
        self._wait_for(self._cut())

    def block(self) -> None:
        """A black hole: connections stay open and nothing passes; new ones open and hear nothing."""
        announce("block", self.name)
        self._set(blocked=True)

    def unblock(self) -> None:
        """Undoes :meth:`block`: what was held back passes."""
        self._set(blocked=False)

    def refuse(self) -> None:
        """New connections are refused; present ones stay. :meth:`cut` afterwards leaves none."""
        announce("refuse", self.name)
        self._on_loop(self._stop_listening)

    def accept(self) -> None:
        """Undoes :meth:`refuse`."""
        self._on_loop(self._listen)

    def delay(self, seconds: float) -> None:
        """Each byte is that late in each direction, so a round trip takes twice as much longer. 0 undoes it.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"bytes cannot be {seconds:g} s late")
        if seconds:
            announce("delay", self.name, f"{seconds:g} s")
        self._set(delay=seconds)

    def throttle(self, bytes_per_second: float | None) -> None:
        """All connections together carry no more than that in each direction. None undoes it.

        Raises:
            ValueError: the rate is not positive.
        """
        if bytes_per_second is not None and bytes_per_second <= 0:
            raise ValueError(f"a link does not carry {bytes_per_second:g} bytes a second: see block()")
        if bytes_per_second is not None:
            announce("throttle", self.name, f"{bytes_per_second:g} bytes/s")
        self._set(rate=bytes_per_second)

    def restore(self) -> None:
        """Undoes all but :meth:`cut`: what was held back passes, new connections are accepted."""
        self._set(blocked=False, delay=0.0, rate=None)
        self.accept()

    def close(self) -> None:
        """Resets the connections and ends the link. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._wait_for(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=_CONTROL_TIMEOUT)
            if not self._thread.is_alive():
                self._loop.close()
            self._guard.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Link({self.name}, {self.address})"

    # ---------------------------------------------------------- on its loop

    def _on_loop(self, do: Callable[[], T]) -> T:
        async def call() -> T:
            return do()

        return self._wait_for(call())

    def _wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError(f"{self.name} is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_CONTROL_TIMEOUT)

    def _set(self, **state: Any) -> None:
        self._on_loop(lambda: self._weather.change(**state))

    def _listen(self) -> None:
        if self._listener is not None or self._closed:
            return
        self._listener = self._bound((self._host, self._port))
        self._listener.listen(1024)
        self._loop.add_reader(self._listener, self._accept)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        """Takes all that wait, without a pause between the kernel's list and ours that a cut would miss."""
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as e:  # no more file descriptors, or the client is gone again
                _logger.warning("%s: a connection could not be accepted: %s", self.name, e)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(0.05, self._accept_again)
                return
            task = self._loop.create_task(self._carry(client))
            self._carrying.add(task)
            task.add_done_callback(partial(self._carried, client))

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    async def _carry(self, client: socket.socket) -> None:
        try:
            await carry(client, self._target, self._weather)
        except OSError as e:
            _logger.debug("%s: a connection ended: %s", self.name, e)
        except Exception:
            _logger.exception("%s: a connection failed", self.name)

    def _carried(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        # Not at the end of the task: one that is cancelled before it has begun has none.
        self._carrying.discard(task)
        reset(client)  # does nothing to one that ended well

    async def _cut(self) -> None:
        self._accept()  # a client is connected before this side has seen it
        await self._reset_all()

    async def _reset_all(self) -> None:
        tasks = list(self._carrying)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _end(self) -> None:
        self._stop_listening()
        await self._reset_all()
        await self._loop.shutdown_default_executor()

    def _bound(self, address: tuple[str, int]) -> socket.socket:
        s = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            # Lets the listening socket share the port with the guard, and come back to it at any time.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.setblocking(False)
            s.bind(address)
        except BaseException:
            s.close()
            raise
        return s
