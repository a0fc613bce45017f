"""etcd as the register in which lighthouses elect their leader.

Three keys a job, below ``/torchft/JOB/``: ``epoch``, a number that stays; ``leader``, which hangs on the leader's
lease and goes with it; and ``last``, the last fenced quorum, which only the leader of the newest epoch may write.
Taking the seat is one transaction: no leader, the epoch as it was seen; then both are written, and ``last`` is read.
The client is ``etcd3gw``, which speaks etcd's JSON over HTTP (etcd 3.4 and later).

A request that fails is not repeated here: the next one goes to the next endpoint, and the caller knows that the failed
one may have been carried out.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchft.coordination.election import RegisterError
from torchft.coordination.record import last_from_json, last_to_json
from torchft.core.election import MAX_EPOCH, Holder, LastQuorum, LeaseOptions, Register
from torchft.runtime.net import parse_address

if TYPE_CHECKING:
    from etcd3gw import Etcd3Client

__all__ = ["EtcdRegister", "parse_ha"]

logger = logging.getLogger(__name__)

_JOB = re.compile(r"[A-Za-z0-9._-]{1,200}")
_MAX_VALUE = 16 * 1024 * 1024


def parse_ha(url: str) -> tuple[tuple[str, ...], str]:
    """``etcd://a:2379,b:2379/job`` as (``("a:2379", "b:2379")``, ``"job"``); the job is ``default`` if none is named.

    Raises:
        ValueError: it is not such a URL.
    """
    scheme, separator, rest = url.strip().partition("://")
    hosts, _, job = rest.partition("/")
    job = job.rstrip("/") or "default"
    try:
        endpoints = tuple(parse_address(text) for text in hosts.split(",") if text.strip())
    except ValueError as e:
        raise ValueError(f"{url!r} is no etcd: {e}") from None
    if scheme != "etcd" or not separator or not endpoints:
        raise ValueError(f"{url!r} is no etcd: expected etcd://host:2379, or etcd://host:2379,host:2379/JOB")
    if not _JOB.fullmatch(job):
        raise ValueError(f"{job!r} is no name of a job: letters, digits, '.', '_' and '-'")
    return endpoints, job


class EtcdRegister:
    """See :class:`torchft.coordination.election.RegisterClient`.

    Args:
        url: ``etcd://host:port[,host:port][/job]``.
        options: the lease.

    Raises:
        ValueError: ``url`` is not one.
        RuntimeError: the client library is not installed.
    """

    def __init__(self, url: str, options: LeaseOptions) -> None:
        self._endpoints, self._job = parse_ha(url)
        try:
            from etcd3gw import Etcd3Client
        except ImportError as e:
            raise RuntimeError(
                f"lighthouses that stand by need etcd's client ({e}): python -m pip install 'torchft[etcd]'"
            ) from e
        self._ttl = math.ceil(options.lease)
        self._clients: list[Etcd3Client] = []
        for endpoint in self._endpoints:
            host, _, port = endpoint.rpartition(":")
            client = Etcd3Client(host.strip("[]"), int(port), timeout=options.patience, api_path="/v3/")
            client.session.trust_env = False  # no proxies from the environment
            self._clients.append(client)
        self._at = 0
        self._epoch_key = _text(f"/torchft/{self._job}/epoch")
        self._leader_key = _text(f"/torchft/{self._job}/leader")
        self._last_key = _text(f"/torchft/{self._job}/last")

    def look(self) -> Register:
        with self._asked() as client:
            get = [{"request_range": {"key": key}} for key in (self._epoch_key, self._leader_key)]
            epoch, leader = client.transaction({"success": get})["responses"]
            return Register(_epoch(_only(epoch)), _holder(_only(leader)))

    def campaign(self, candidate: Holder, expected: int) -> tuple[Holder, LastQuorum | None] | None:
        with self._asked() as client:
            lease = client.lease(self._ttl)
            holder = replace(candidate, lease=int(lease.id))
            value = json.dumps(
                {
                    "name": holder.name,
                    "address": holder.address,
                    "life_address": holder.life_address,
                    "epoch": holder.epoch,
                }
            )
            free = {"key": self._leader_key, "target": "CREATE", "result": "EQUAL", "create_revision": 0}
            unchanged: dict[str, Any] = {"key": self._epoch_key, "result": "EQUAL"}
            unchanged |= (
                {"target": "VALUE", "value": _text(f"{expected}")} if expected else {"target": "VERSION", "version": 0}
            )
            put = [
                {"request_put": {"key": self._epoch_key, "value": _text(f"{holder.epoch}")}},
                {"request_put": {"key": self._leader_key, "value": _text(value), "lease": holder.lease}},
                {"request_range": {"key": self._last_key}},
            ]
            won = client.transaction({"compare": [free, unchanged], "success": put})
            if won.get("succeeded"):
                return holder, _last(_only(won["responses"][2]))
        with contextlib.suppress(RegisterError):
            self.vacate(holder.lease)
        return None

    def renew(self, lease: int) -> bool:
        from etcd3gw import Lease

        with self._asked() as client:
            return Lease(lease, client).refresh() > 0

    def vacate(self, lease: int) -> None:
        from etcd3gw import Lease

        with self._asked() as client:
            try:
                Lease(lease, client).revoke()
            except Exception as e:
                if "lease not found" not in f"{e} {getattr(e, 'detail_text', '')}":
                    raise

    def remember(self, epoch: int, last: LastQuorum | None) -> bool:
        with self._asked() as client:
            newest = {"key": self._epoch_key, "result": "EQUAL", "target": "VALUE", "value": _text(f"{epoch}")}
            put = {"key": self._last_key, "value": _text(json.dumps(last_to_json(last)))}
            answer = client.transaction({"compare": [newest], "success": [{"request_put": put}]})
            return bool(answer.get("succeeded"))

    def close(self) -> None:
        for client in self._clients:
            client.session.close()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[Etcd3Client]:
        """The client to ask now. What it raises becomes a RegisterError, and the next one is asked next time."""
        try:
            yield self._clients[self._at]
        except Exception as e:  # the library's, those of its HTTP client, and answers that are not etcd's
            endpoint = self._endpoints[self._at]
            self._at = (self._at + 1) % len(self._clients)
            detail = getattr(e, "detail_text", "") or e
            raise RegisterError(f"etcd at {endpoint} did not answer as it should ({type(e).__name__}: {detail})") from e


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _only(response: Any) -> dict[str, Any] | None:
    """The key of a range response, if there is one."""
    found = response["response_range"].get("kvs", [])
    return found[0] if found else None


def _value(found: dict[str, Any]) -> str:
    data = base64.b64decode(found.get("value", ""))
    if len(data) > _MAX_VALUE:
        raise ValueError(f"a value of {len(data)} bytes is no lighthouse's")
    return data.decode()


def _last(found: dict[str, Any] | None) -> LastQuorum | None:
    return None if found is None else last_from_json(json.loads(_value(found)))


def _epoch(found: dict[str, Any] | None) -> int:
    if found is None:
        return 0
    epoch = int(_value(found))
    if not 0 < epoch <= MAX_EPOCH:
        raise ValueError(f"epoch {epoch} is not between 1 and {MAX_EPOCH}")
    return epoch


def _holder(found: dict[str, Any] | None) -> Holder | None:
    if found is None:
        return None
    value = json.loads(_value(found))
    fields = {name: value[name] for name in ("name", "address", "life_address")}
    if not all(isinstance(text, str) for text in fields.values()):
        raise ValueError(f"{value!r} is no lighthouse")
    return Holder(**fields, epoch=int(value["epoch"]), lease=int(found.get("lease", 0)))
