"""``torchft lighthouse`` and ``torchft_lighthouse``: a lighthouse in a process of its own.

It remembers its epoch in a state file, so that no quorum id is used twice across restarts. Without ``--state_file``
that is a file of this user, named after the machine and ``--bind``: another machine may share the home folder, and
another lighthouse the machine. With any free port (``:0``) there is none: nobody would find this lighthouse again.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from pathlib import Path

import click

from torchft import config
from torchft.coordination.lighthouse_server import LighthouseServer
from torchft.runtime.net import split_bind
from torchft.runtime.signals import EndSignals

__all__ = ["default_state_file", "lighthouse", "main"]

logger = logging.getLogger(__name__)


def default_state_file(bind: str) -> Path | None:
    """Where a lighthouse that listens on ``bind`` remembers its epoch; None: nowhere.

    Raises:
        ValueError: ``bind`` is not ``host:port``.
    """
    host, port = split_bind(bind)
    if port == 0:
        return None
    where = re.sub(r"[^A-Za-z0-9.]+", "_", f"{socket.gethostname()}-{'any' if host in ('::', '0.0.0.0') else host}")
    try:
        folder = Path(config.STATE_DIR.read()).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to")
    except (OSError, RuntimeError) as e:  # RuntimeError: there is no home
        logger.warning(
            "no place for a state file (%s): after a restart this lighthouse begins again with the ids it has used. "
            "Name one (--state_file), or none on purpose (--state_file none).",
            e,
        )
        return None
    return folder / f"lighthouse-{where}-{port}.json"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--min_replicas", "--min-replicas", type=click.IntRange(1), required=True, help="No quorum has fewer members."
)
@click.option("--bind", default="[::]:29510", help="host:port to listen on; [::] is every interface.")
@click.option(
    "--join_timeout_ms",
    "--join-timeout-ms",
    type=click.IntRange(0),
    default=60000,
    help="How long a quorum that could form waits for healthy replicas that have not asked yet.",
)
@click.option(
    "--quorum_tick_ms",
    "--quorum-tick-ms",
    type=click.IntRange(1),
    default=100,
    help="How often time-dependent rules are looked at.",
)
@click.option(
    "--heartbeat_timeout_ms",
    "--heartbeat-timeout-ms",
    type=click.IntRange(1),
    default=5000,
    help="A replica silent for longer is no longer healthy.",
)
@click.option(
    "--failure_tick_ms",
    "--failure-tick-ms",
    type=click.IntRange(1),
    default=1000,
    help="How often failures are looked for, at the latest.",
)
@click.option(
    "--state_file",
    "--state-file",
    help="Where it remembers which quorum ids were used, or 'none'. "
    "[default: ~/.local/state/torchft/lighthouse-HOST-BIND-PORT.json]",
    show_default=False,
)
@click.option(
    "--ha",
    metavar="etcd://HOST:PORT[,HOST:PORT][/JOB]",
    help="Be one of several lighthouses of the job: they elect in this etcd the one that leads, the others stand by.",
)
@click.option(
    "--ha_lease_ms",
    "--ha-lease-ms",
    type=click.IntRange(500),
    default=5000,
    help="With --ha: how long a leader that is not heard of keeps the others from leading.",
)
@click.option(
    "--forget",
    type=click.IntRange(1),
    metavar="QUORUM_ID",
    show_default=False,
    help="The members of the last quorum, which has this id by the log, are gone for good: those of them that cannot "
    "be reached are not waited for. Does nothing when the last quorum is another one.",
)
@click.option(
    "--end_when_idle_sec",
    "--end-when-idle-sec",
    type=click.FloatRange(0, min_open=True),
    default=None,
    show_default=False,
    help="End by itself when there were groups and for this long there are none: the job is over.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log every quorum, not only changes.")
def lighthouse(
    min_replicas: int,
    bind: str,
    join_timeout_ms: int,
    quorum_tick_ms: int,
    heartbeat_timeout_ms: int,
    failure_tick_ms: int,
    state_file: str | None,
    ha: str | None,
    ha_lease_ms: int,
    forget: int | None,
    end_when_idle_sec: float | None,
    verbose: bool,
) -> None:
    """Runs the job's lighthouse: it decides which replica groups form the quorum.

    One per job. Point the groups at it with TORCHFT_LIGHTHOUSE=http://HOST:29510. Ctrl-C or SIGTERM ends it.

    Or several on different machines with --ha, and TORCHFT_LIGHTHOUSE=http://A:29510,http://B:29510.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s [%(levelname)s] %(name)s - %(message)s",
    )
    logging.getLogger("urllib3").setLevel(logging.INFO)  # a line for each word with etcd is no user's business
    try:
        if ha is None and state_file is None:
            kept = default_state_file(bind)
        else:
            kept = None if state_file in (None, "none") else Path(state_file)
        server = LighthouseServer(
            bind,
            min_replicas,
            join_timeout_ms,
            quorum_tick_ms,
            heartbeat_timeout_ms,
            failure_tick_ms,
            state_file=kept,
            ha=ha,
            ha_lease_ms=ha_lease_ms,
            forget=forget,
        )
    except (RuntimeError, ValueError) as e:
        raise click.ClickException(str(e)) from e
    with EndSignals() as signals:
        click.echo(f"lighthouse at {server.address()} (export TORCHFT_LIGHTHOUSE={server.address()})", err=True)
        if end_when_idle_sec is None:
            signals.wait()
        else:
            _wait_until_idle(server, end_when_idle_sec, signals)
        click.echo("lighthouse stops", err=True)
        server.shutdown()


def _wait_until_idle(server: LighthouseServer, limit: float, signals: EndSignals) -> None:
    """Until there were groups and for ``limit`` seconds there are none, or a signal to end has come."""
    last_seen: float | None = None
    while not signals.wait(min(0.2, limit / 4)):
        if server.replicas():
            last_seen = time.monotonic()
        elif last_seen is not None and time.monotonic() - last_seen >= limit:
            click.echo(f"no group has been there for {limit:g} s: the job is over", err=True)
            return


def main() -> None:
    """The ``torchft_lighthouse`` command of existing launch scripts."""
    lighthouse(prog_name="torchft_lighthouse")


if __name__ == "__main__":
    main()
