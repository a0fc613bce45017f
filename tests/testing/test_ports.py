"""A reserved port is nobody else's, and whoever names it listens there."""

from __future__ import annotations

import socket

import pytest

from torchft.coordination import LighthouseServer
from torchft.testing.ports import ReservedPort


def test_it_is_given_to_nobody_who_asks_for_any_and_nobody_answers_there() -> None:
    with ReservedPort() as kept:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", kept.port), timeout=30).close()
        for _ in range(2000):
            with socket.create_server(("127.0.0.1", 0)) as server:
                assert server.getsockname()[1] != kept.port


@pytest.mark.parametrize("host", ["127.0.0.1", "[::]"])
def test_a_server_that_names_it_listens_there_again_and_again(host: str) -> None:
    with ReservedPort() as kept:
        for _ in range(2):
            server = LighthouseServer(f"{host}:{kept.port}", 1)
            try:
                socket.create_connection(("127.0.0.1", kept.port), timeout=30).close()
                with pytest.raises(RuntimeError, match="port is in use"):
                    LighthouseServer(f"{host}:{kept.port}", 1)
            finally:
                server.shutdown()
