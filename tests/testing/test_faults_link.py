"""The breakable network: real sockets on both sides."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import pytest

from torchft.coordination import LighthouseClient, LighthouseServer
from torchft.testing.faults import Link
from torchft.testing.faults.link_connection import Weather
from torchft.testing.wait import wait_until


class _Echo:
    """Sends back what it gets; counts its connections and how they ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.ends: list[str] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                s, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(s)
            threading.Thread(target=self._serve, args=(s,), daemon=True).start()

    def _serve(self, s: socket.socket) -> None:
        try:
            with s:
                while data := s.recv(1 << 20):
                    s.sendall(data)
            self.ends.append("end")
        except OSError as e:
            self.ends.append(type(e).__name__)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for s in self._sockets:
            s.close()


@pytest.fixture
def echo() -> Iterator[_Echo]:
    with closing(_Echo()) as e:
        yield e


@pytest.fixture
def link(echo: _Echo) -> Iterator[Link]:
    with Link(echo.address) as made:
        yield made


def _connect(link: Link, timeout: float = 30.0) -> socket.socket:
    host, _, port = link.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def _echoed(s: socket.socket, data: bytes = b"ping") -> float:
    """Seconds for a round trip."""
    begin = time.monotonic()
    s.sendall(data)
    assert _receive(s, len(data)) == data
    return time.monotonic() - begin


def _receive(s: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = s.recv(min(1 << 20, size - len(got)))
        assert piece, f"the stream ended after {len(got)} of {size} bytes"
        got += piece
    return bytes(got)


def _is_silent(s: socket.socket, seconds: float) -> bool:
    s.settimeout(seconds)
    try:
        s.recv(1)
    except TimeoutError:
        return True
    finally:
        s.settimeout(30.0)
    return False


def test_big_transfers_pass_unchanged_both_ways(link: Link) -> None:
    data = os.urandom(1 << 20) * 32
    with _connect(link) as s:
        sender = threading.Thread(target=s.sendall, args=(data,))
        sender.start()
        got = _receive(s, len(data))
        sender.join(30)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def test_the_end_of_a_stream_passes_and_the_other_direction_stays(link: Link, echo: _Echo) -> None:
    with _connect(link) as s:
        s.sendall(b"last words")
        s.shutdown(socket.SHUT_WR)
        assert _receive(s, 10) == b"last words"
        assert s.recv(1) == b""
    wait_until(lambda: echo.ends == ["end"], what="the server's end")
    wait_until(lambda: link.connections == 0, what="the link's end")


def test_cut_resets_both_ends_and_new_connections_work(link: Link, echo: _Echo) -> None:
    with _connect(link) as a, _connect(link) as b:
        _echoed(a)
        _echoed(b)
        assert link.connections == 2
        link.cut()
        assert link.connections == 0
        for s in (a, b):
            with pytest.raises(ConnectionResetError):
                s.recv(1)
        wait_until(lambda: len(echo.ends) == 2, what="the server's ends")
        assert echo.ends == ["ConnectionResetError"] * 2
    with _connect(link) as s:
        _echoed(s)


def test_cut_reaches_connections_that_have_only_just_begun(link: Link) -> None:
    for _ in range(30):
        with _connect(link) as s:
            link.cut()
            with pytest.raises(ConnectionResetError):
                s.recv(1)


def test_blocked_connections_stay_open_and_silent_and_lose_nothing(link: Link) -> None:
    with _connect(link) as old:
        _echoed(old)
        link.block()
        old.sendall(b"held")
        with _connect(link) as new:
            new.sendall(b"back")
            assert _is_silent(old, 0.2)
            assert _is_silent(new, 0.1)
            link.unblock()
            assert _receive(old, 4) == b"held"
            assert _receive(new, 4) == b"back"


def test_blocked_in_the_middle_of_a_transfer_nothing_more_passes(link: Link) -> None:
    size = 64 << 20
    with _connect(link) as s:
        sender = threading.Thread(target=s.sendall, args=(bytes(size),), daemon=True)
        sender.start()
        _receive(s, 1 << 20)
        link.block()
        rest = size - (1 << 20)
        s.settimeout(0.3)
        try:
            while rest:  # what had passed the link before
                rest -= len(s.recv(1 << 20))
        except TimeoutError:
            pass
        assert rest > 0
        s.settimeout(30)
        link.restore()
        _receive(s, rest)
        sender.join(30)


def test_refused_keeps_the_address_and_the_present_connections(link: Link) -> None:
    with _connect(link) as old:
        _echoed(old)
        for _ in range(3):
            link.refuse()
            with pytest.raises(ConnectionRefusedError):
                _connect(link)
            _echoed(old)
            link.accept()
            with _connect(link) as new:
                _echoed(new)


def test_delayed_bytes_are_late_in_both_directions_but_not_slow(link: Link) -> None:
    with _connect(link) as s:
        _echoed(s)
        link.delay(0.15)
        assert _echoed(s) >= 0.3
        # Many pieces are on their way at once: 200 in a row are not 200 times as late.
        begin = time.monotonic()
        for i in range(200):
            s.sendall(b"%04d" % i)
        assert _receive(s, 800) == b"".join(b"%04d" % i for i in range(200))
        assert 0.3 <= time.monotonic() - begin < 25
        s.sendall(b"soon")
        link.delay(0)
        assert _receive(s, 4) == b"soon"


def test_throttled_connections_share_the_rate(link: Link) -> None:
    with _connect(link) as a, _connect(link) as b:
        link.throttle(200_000)
        begin = time.monotonic()
        for s in (a, b):
            s.sendall(bytes(50_000))
        for s in (a, b):
            _receive(s, 50_000)
        assert time.monotonic() - begin >= 0.45  # 100 kB, less the first piece
        link.throttle(None)
        _echoed(a, bytes(1 << 20))


def test_a_rate_is_reached_though_timers_wake_late(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, piece, late, ticks = 1e6, 1000, 0.003, 1000  # a piece takes 1 ms, and who waits wakes after 3
    now = 100.0

    async def carried() -> int:
        nonlocal now
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: now)
        weather = Weather()
        weather.change(rate=rate)
        total = 0
        for _ in range(ticks):
            now += late
            while True:
                turn = loop.create_task(weather.turn(0, piece))
                await asyncio.sleep(0)
                if not turn.done():
                    turn.cancel()
                    break
                weather.sent(0, turn.result())
                total += turn.result()
        return total

    assert asyncio.run(carried()) == pytest.approx(rate * late * ticks, rel=0.02)


def test_a_target_that_is_not_there_resets() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # The reset may be there before connect() returns.
        with (
            Link(f"127.0.0.1:{free.getsockname()[1]}") as link,
            pytest.raises(ConnectionResetError),
            _connect(link) as s,
        ):
            s.recv(1)


def test_closed_is_closed(echo: _Echo) -> None:
    link = Link(f"http://{echo.address}")
    with _connect(link) as s:
        _echoed(s)
        link.close()
        link.close()
        with pytest.raises(ConnectionResetError):
            s.recv(1)
    with pytest.raises(ConnectionRefusedError):
        _connect(link)
    with pytest.raises(RuntimeError, match="closed"):
        link.cut()
    assert not [t for t in threading.enumerate() if t.name == "torchft-link"]


@pytest.mark.parametrize("wrong", [lambda k: k.delay(-1), lambda k: k.throttle(0)])
def test_what_cannot_be_is_refused(link: Link, wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match="bytes"):
        wrong(link)


def test_grpc_passes_and_sees_the_faults() -> None:
    server = LighthouseServer("127.0.0.1:0", min_replicas=1, join_timeout_ms=100)
    try:
        with Link(server.address()) as link:
            client = LighthouseClient(f"http://{link.address}", timedelta(seconds=60))
            client.heartbeat("a", timedelta(seconds=60))
            link.delay(0.1)
            begin = time.monotonic()
            client.heartbeat("a", timedelta(seconds=60))
            assert time.monotonic() - begin >= 0.2
            link.restore()
            link.block()
            with pytest.raises(TimeoutError):
                client.heartbeat("a", timedelta(seconds=0.3))
            link.restore()
            client.heartbeat("a", timedelta(seconds=60))
    finally:
        server.shutdown()


def test_http_passes() -> None:
    body = os.urandom(1 << 20)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Link(f"127.0.0.1:{server.server_address[1]}") as link:
            connection = http.client.HTTPConnection(link.address, timeout=30)
            for _ in range(3):
                connection.request("GET", "/")
                assert connection.getresponse().read() == body
            connection.close()
    finally:
        server.shutdown()
        server.server_close()
