"""The control protocol between implementations: each client gets the same answers from each server."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.processes import OURS, PEER, Child, Cluster, Event, Implementation

pytestmark = pytest.mark.peer

HERE = Path(__file__).resolve().parent


def ask(cluster: Cluster, clients: Implementation, servers: Implementation) -> tuple[Child, Child]:
    """Starts clients that ask servers everything. Returns both."""
    server = cluster.spawn(servers, HERE / "wire_servers.py", name=f"{servers.name}-servers")
    server.hello()
    where = server.wait("address", 90)
    args = ("--lighthouse", where["lighthouse"], "--managers", json.dumps(where["managers"]))
    return server, cluster.spawn(clients, HERE / "wire_clients.py", *args, name=f"{clients.name}-clients")


@pytest.mark.parametrize(("clients", "servers"), [(OURS, PEER), (PEER, OURS)], ids=["ours-asks-peer", "peer-asks-ours"])
def test_a_foreign_server_answers_every_call_as_the_own_one_does(
    cluster: Cluster, clients: Implementation, servers: Implementation
) -> None:
    own_server, own_client = ask(cluster, clients, clients)
    server, client = ask(cluster, clients, servers)
    own, foreign = (c.wait("answers", 150) for c in (own_client, client))
    assert foreign["lighthouse"] == own["lighthouse"]
    assert foreign["managers"] == own["managers"]
    for each in (server, own_server):
        each.tell("stop")
        assert each.end(90) == 0

    lighthouse, managers = foreign["lighthouse"], foreign["managers"]
    assert lighthouse["alone, below min_replicas"] == "TimeoutError"
    assert lighthouse["same answer for both"] is True
    assert lighthouse["id grows only with a change"] == 0
    assert [member[0] for member in lighthouse["two members"][0]] == ["a", "b"]
    assert managers["one rank of two asks"] == managers["one of two votes"] == "TimeoutError"
    assert managers["metadata"] == "metadata of rank 1"
    assert managers["vote True True"] == [True, True]
    assert managers["vote True False"] == [False, False]
    assert [r["heal"] for r in managers["one behind"]] == [False, False, True, True, False, False]


def test_our_client_says_that_the_peers_lighthouse_announces_no_failures(cluster: Cluster) -> None:
    address = cluster.lighthouse(PEER)
    onlooker = cluster.spawn(OURS, HERE / "wire_clients.py", "--lighthouse", address, "--watch", name="onlooker")
    onlooker.hello()
    said = onlooker.wait("unsubscribed", 90)
    assert said["kind"] == "RuntimeError"
    assert "subscribe_failures" in said["message"]
    assert address.removeprefix("http://") in said["message"]


def test_our_lighthouse_tells_an_onlooker_that_a_peers_replica_has_died(cluster: Cluster) -> None:
    lighthouse = cluster.spawn(OURS, HERE / "wire_servers.py", name="ours-servers")
    lighthouse.hello()
    address = lighthouse.wait("address", 90)["lighthouse"]
    onlooker = cluster.spawn(OURS, HERE / "wire_clients.py", "--lighthouse", address, "--watch", name="onlooker")
    onlooker.hello()
    onlooker.wait("watching", 90)
    asker = cluster.spawn(PEER, HERE / "wire_clients.py", "--lighthouse", address, name="peer-clients")
    asker.hello()
    asker.wait("answers", 150)
    asker.kill()
    for replica in "ab":
        notice = onlooker.wait("failure", 90, partial(_names, replica))
        assert "heartbeat" in notice["message"]


def _names(replica: str, event: Event) -> bool:
    return bool(event["replica"] == replica)
