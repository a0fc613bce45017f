"""Events for OpenTelemetry, read back by a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import gzip
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.groups import Groups
from torchft import telemetry
from torchft.telemetry import FLUSH_SEC
from torchft.testing.wait import wait_until

logs_service = pytest.importorskip("opentelemetry.proto.collector.logs.v1.logs_service_pb2", reason="no [otel] extra")


class Collector(ThreadingHTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        for resource in logs_service.ExportLogsServiceRequest.FromString(body).resource_logs:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    attributes = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in record.attributes}
                    self.events.append((scope.scope.name, record.event_name, attributes))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [attributes for _, event, attributes in self.events if event == name]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.take(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("TORCHFT_USE_OTEL", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "100")
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    telemetry._provider.cache_clear()
    yield server
    telemetry._provider.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_quorums_heals_commits_failures_and_errors_reach_a_collector(collector: Collector, pair: Groups) -> None:
    a, b = pair.replica("a"), pair.replica("b")
    pair.together(a.step, b.step)
    pair.together(a.step, b.step)
    a.optimizer.zero_grad()
    a.manager.report_error(ValueError("a loss that is not a number"))
    a.optimizer.step()

    wait_until(lambda: len(collector.named("torchft.step_failed")) == 1)
    ids = {r.manager.replica_id() for r in (a, b)}
    assert {e["torchft.replica_id"] for e in collector.named("torchft.quorum")} == ids
    heals = collector.named("torchft.heal")
    assert len(heals) == 1
    assert {heals[0]["torchft.replica_id"], heals[0]["torchft.source"]} == ids
    commits = collector.named("torchft.commit")
    assert sorted((e["torchft.replica_id"], e["torchft.step"]) for e in commits) == sorted(
        (i, step) for i in ids for step in (1, 2)
    )
    assert {e["torchft.participants"] for e in commits if e["torchft.step"] == 2} == {2}
    assert [e["exception.message"] for e in collector.named("torchft.error")] == ["a loss that is not a number"]
    assert "not a number" in collector.named("torchft.step_failed")[0]["torchft.cause"]
    assert {scope for scope, _, _ in collector.events} == {"torchft_quorums", "torchft_commits", "torchft_errors"}
    assert collector.services == {"torchft"}


def test_a_collector_that_is_not_there_holds_nobody_up_at_the_end() -> None:
    program = (
        "from torchft.telemetry import telemetry_of\n"
        "t = telemetry_of('group', 0, lambda: 3)\n"
        "for _ in range(10_000): t.commit(2, 6)\n"
        "print('trained', flush=True)\n"
    )
    env = {"TORCHFT_USE_OTEL": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PATH": ""}
    child = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"trained\n"
    since = time.monotonic()
    child.communicate(timeout=FLUSH_SEC + 40)
    assert child.returncode == 0
    assert time.monotonic() - since < FLUSH_SEC + 20  # OpenTelemetry alone would try for a minute


def test_without_the_packages_a_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHFT_USE_OTEL", "1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk._logs", None)
    telemetry._provider.cache_clear()
    with caplog.at_level(logging.WARNING):
        silent = telemetry.telemetry_of("group", 0, lambda: 0)
    silent.commit(1, 1)
    telemetry._provider.cache_clear()
    assert "pip install 'torchft[otel]'" in caplog.text
