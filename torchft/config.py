"""Every environment variable torchft reads, in one table.

Nothing else in the package touches ``os.environ`` for a setting: a module asks for it by the constant defined
here (``config.TIMEOUT_SEC.read()``), so that name, type, default and meaning stand in one place.
``docs/configuration.md`` is generated from this table (``python -m torchft.config``), and ``make lint`` checks
that it is current.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, Literal, TypeVar

__all__ = ["SETTINGS", "ConfigError", "Setting", "markdown"]

T = TypeVar("T")


class ConfigError(ValueError):
    """An environment variable holds something that cannot be used. The message names it and what it expects."""


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One environment variable."""

    name: str
    kind: str
    """What a value looks like, for people: ``seconds``, ``host:port``, ``0 or 1``."""
    default: T
    meaning: str
    parse: Callable[[str], T]

    def read(self) -> T:
        """The value now, or the default when the variable is unset or empty.

        Raises:
            ConfigError: the variable is set to something that is not a ``kind``.
        """
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as e:
            raise ConfigError(f"{self.name}={text!r} is not usable: expected {self.kind} ({e})") from e

    def is_set(self) -> bool:
        return bool(os.environ.get(self.name, "").strip())


def _seconds(text: str) -> timedelta:
    value = float(text)
    if not 1e-6 <= value < 10**9:
        raise ValueError("a positive number of seconds is needed")
    return timedelta(seconds=value)


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError("a port is between 0 and 65535")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("a number of at least 0 is needed")
    return value


def _host(text: str) -> str:
    if "/" in text or any(c.isspace() for c in text) or text.count(":") == 1 or text.startswith("["):
        raise ValueError("a name or an address is needed, without http:// and without a port")
    return text


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("0", "false", "no", "off"):
        return False
    if lowered in ("1", "true", "yes", "on"):
        return True
    raise ValueError("0 or 1 is needed")


def _comparing(text: str) -> Literal["sample", "all", "none"]:
    match text.lower():
        case "sample" | "all" | "none" as known:
            return known
    raise ValueError("one of these three words is needed")


_none_seconds: timedelta | None = None
_none_int: int | None = None
_none_str: str | None = None
_none_flag: bool | None = None

LIGHTHOUSE = Setting(
    "TORCHFT_LIGHTHOUSE",
    "address",
    _none_str,
    "Address of the job's lighthouse, `http://host:29510`; where others stand by, all of them with commas between.",
    str,
)
MANAGER_PORT = Setting(
    "TORCHFT_MANAGER_PORT",
    "port",
    _none_int,
    "Port of the group's ManagerServer, which its rank 0 starts. Any free port when unset.",
    _port,
)
TIMEOUT_SEC = Setting(
    "TORCHFT_TIMEOUT_SEC",
    "seconds",
    _none_seconds,
    "Longest wait for a collective, a commit vote or a state transfer. Wins over `Manager(timeout=)`.",
    _seconds,
)
QUORUM_TIMEOUT_SEC = Setting(
    "TORCHFT_QUORUM_TIMEOUT_SEC",
    "seconds",
    _none_seconds,
    "Longest wait for a quorum. Wins over `Manager(quorum_timeout=)`.",
    _seconds,
)
CONNECT_TIMEOUT_SEC = Setting(
    "TORCHFT_CONNECT_TIMEOUT_SEC",
    "seconds",
    _none_seconds,
    "How long an address that does not answer yet is tried again. Wins over `Manager(connect_timeout=)`.",
    _seconds,
)
HEAL_PAUSE_SEC = Setting(
    "TORCHFT_HEAL_PAUSE_SEC",
    "seconds",
    _none_seconds,
    "Longest that a heal may hold the other groups up: one that would take longer is not begun. Unset: 2 s, a step of "
    "theirs, or, over a way of 2 MB/s or more, a tenth of the time that was waited for it. Wins over "
    "`Manager(heal_pause=)`.",
    _seconds,
)
QUORUM_RETRIES = Setting(
    "TORCHFT_QUORUM_RETRIES",
    "count",
    _none_int,
    "How often a failed lighthouse call of a quorum is repeated. Wins over `Manager(quorum_retries=)`.",
    _count,
)
HOST = Setting(
    "TORCHFT_HOST",
    "host name or IP",
    _none_str,
    "The address of this machine that others are told. By default the interface that routes to the lighthouse.",
    _host,
)
TOKEN = Setting(
    "TORCHFT_TOKEN",
    "printable ASCII without spaces",
    _none_str,
    "A secret of the job: the Manager's default transport gives the state only to who presents it, and presents it to "
    "others. The same in all groups. Another transport is given its own, `HTTPTransport(token=)`.",
    str,
)
PROACTIVE_RECOVERY = Setting(
    "TORCHFT_PROACTIVE_RECOVERY",
    "0 or 1",
    True,
    "Hold sessions, and act on deaths as soon as they are seen. With 0 only heartbeats and timeouts tell of them.",
    _flag,
)
DRAIN = Setting(
    "TORCHFT_DRAIN",
    "0 or 1",
    False,
    "On SIGTERM finish the step under way, leave the job and exit with code 0. Wins over `Manager(drain=)`.",
    _flag,
)
COMPARE_SOURCES: Setting[Literal["sample", "all", "none"]] = Setting(
    "TORCHFT_COMPARE_SOURCES",
    "sample, all or none",
    "sample",
    "What a healing group asks of the groups that it takes nothing from, to find one whose state differs: the hashes "
    "of a few chunks drawn at random, all hashes, or nothing. `HTTPTransport(compare_sources=)` wins.",
    _comparing,
)
CROSS_MEMORY = Setting(
    "TORCHFT_CROSS_MEMORY",
    "0 or 1",
    True,
    "Let a healing group copy the state straight out of the memory of a source of the same machine and user, where the "
    "system lets it (`process_vm_readv`). With 0 it comes over a Unix socket, as where the system does not let it: for "
    "sandboxes that end a process which tries.",
    _flag,
)
STATE_DIR = Setting(
    "TORCHFT_STATE_DIR",
    "folder",
    "~/.local/state/torchft",
    "Where the lighthouse command keeps its state file unless `--state_file` names one.",
    str,
)
ALLOW_RESTART = Setting(
    "TORCHFT_ALLOW_RESTART",
    "0 or 1",
    _none_flag,
    "Whether the job may begin again at step 0 when the last replica that held its state is gone. Unset: only if all "
    "groups are new, with a warning. Wins over `Manager(allow_restart=)`.",
    _flag,
)
USE_OTEL = Setting(
    "TORCHFT_USE_OTEL",
    "0 or 1",
    False,
    "Send quorums, commits, errors and heals to OpenTelemetry's `OTEL_EXPORTER_OTLP_ENDPOINT` (extra `[otel]`).",
    _flag,
)
FLIGHT_RECORDER = Setting(
    "TORCHFT_FLIGHT_RECORDER",
    "start of a path",
    _none_str,
    "Where a collective of a GPU fails or takes too long, torch's flight recorder is written to this and the rank. "
    "torch records only with `TORCH_FR_BUFFER_SIZE` set.",
    str,
)


# What torchrun and other launchers set for each process of a group.
RANK = Setting("RANK", "rank", 0, "This process's rank inside its replica group. Set by torchrun.", _count)
WORLD_SIZE = Setting("WORLD_SIZE", "count", 1, "Ranks in this replica group. Set by torchrun.", _count)
MASTER_ADDR = Setting("MASTER_ADDR", "host", _none_str, "Host of the group's TCPStore. Set by torchrun.", str)
MASTER_PORT = Setting("MASTER_PORT", "port", _none_int, "Port of the group's TCPStore. Set by torchrun.", _port)
GLOO_SOCKET_IFNAME = Setting(
    "GLOO_SOCKET_IFNAME",
    "interface",
    _none_str,
    "The network interface of gloo's connections; commas between several. Unset: that of the address to which the host "
    "name resolves, or, where this is a loopback address, the one that routes to the store in which the groups meet.",
    str,
)
RESTART_COUNT = Setting(
    "TORCHELASTIC_RESTART_COUNT", "count", 0, "Which life of the group this is. Set by torchrun.", _count
)

SETTINGS: tuple[Setting[object], ...] = tuple(s for s in list(globals().values()) if isinstance(s, Setting))


def markdown() -> str:
    """The table of ``docs/configuration.md``."""
    lines = [
        "# Environment variables",
        "",
        "Generated from `torchft/config.py` by `python -m torchft.config > docs/configuration.md`.",
        "",
        "| variable | value | default | meaning |",
        "|---|---|---|---|",
    ]
    for s in SETTINGS:
        default = "" if s.default is None else f"{int(s.default)}" if isinstance(s.default, bool) else f"{s.default}"
        lines.append(f"| `{s.name}` | {s.kind} | {default} | {s.meaning} |")
    return "\n".join(lines) + "\n"


def _main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        with open(sys.argv[2], encoding="utf-8") as f:
            if f.read() != markdown():
                sys.exit(f"{sys.argv[2]} is not current. Run: make proto")
        return
    print(markdown(), end="")


if __name__ == "__main__":
    _main()
