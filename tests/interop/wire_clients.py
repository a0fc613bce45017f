"""Every call of the control protocol, from the clients of either implementation to the servers of either.

Says `answers`: what each call returned, or the kind of error it raised. Nothing in it depends on
chance (quorum ids only as differences), so the answers of two implementations can be compared as they are.
"""

import argparse
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

from report import hello, say

from torchft.coordination import LighthouseClient, ManagerClient

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=500)


def outcome(call: Callable[[], object]) -> object:
    """What it returns, or the builtin kind of what it raises."""
    try:
        return call()
    except TimeoutError:
        return "TimeoutError"
    except (RuntimeError, ValueError, TypeError) as e:
        return next(k.__name__ for k in (RuntimeError, ValueError, TypeError) if isinstance(e, k))


def together(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def lighthouse(address: str) -> dict[str, object]:
    client = LighthouseClient(address, LONG)
    other = LighthouseClient(address, LONG)

    def ask(asker: LighthouseClient, name: str, step: int, data: object, shrink_only: bool = False) -> object:
        quorum = asker.quorum(
            name,
            LONG,
            address=f"manager-of-{name}",
            store_address=f"store-of-{name}",
            step=step,
            world_size=4,
            shrink_only=shrink_only,
            data=data,
        )
        members = [
            [m.replica_id, m.address, m.store_address, m.step, m.world_size, m.shrink_only, m.data]
            for m in quorum.participants
        ]
        return {"id": quorum.quorum_id, "members": members, "created": quorum.created is not None}

    answers: dict[str, object] = {"heartbeat": outcome(lambda: client.heartbeat("a"))}
    first = together(
        lambda: ask(client, "a", 3, {"speed": [1, 2.5], "name": "é"}), lambda: ask(other, "b", 4, {"speed": []})
    )
    second = together(lambda: ask(client, "a", 4, {}), lambda: ask(other, "b", 5, {"x": None}, shrink_only=True))
    answers["two members"] = [q["members"] for q in first + second]
    answers["same answer for both"] = first[0] == first[1] and second[0] == second[1]
    answers["id grows only with a change"] = second[0]["id"] - first[0]["id"]
    answers["data that is not JSON"] = outcome(lambda: client.quorum("a", LONG, data={"x": object()})) is not None
    with socket.socket() as free:
        free.bind(("localhost", 0))
        nobody = f"http://localhost:{free.getsockname()[1]}"
        nothing = outcome(lambda: LighthouseClient(nobody, SHORT).heartbeat("a", timeout=SHORT))
        answers["nobody listens"] = nothing in ("TimeoutError", "RuntimeError")  # which of them differs
    # Last: a request whose caller gave up may still count as waiting, and would meet the next one of "b" alone.
    answers["alone, below min_replicas"] = outcome(lambda: client.quorum("a", SHORT))
    return answers


def watch(address: str) -> None:
    """Says which failures the lighthouse announces, until the subscription ends."""
    try:
        notices = LighthouseClient(address, LONG).subscribe_failures(timeout=4 * LONG)
        say("watching")
        for notice in notices:
            say("failure", replica=notice.replica_id, message=notice.error_message)
    except (TimeoutError, RuntimeError) as e:
        say("unsubscribed", kind=type(e).__name__, message=str(e))


FIELDS = [
    "replica_rank",
    "replica_world_size",
    "recover_src_manager_address",
    "recover_src_replica_rank",
    "recover_dst_replica_ranks",
    "store_address",
    "max_step",
    "max_replica_rank",
    "max_world_size",
    "heal",
    "replica_ids",
]


def managers(addresses: dict[str, str]) -> dict[str, object]:
    names = {address: f"<{name}>" for name, address in addresses.items()}
    groups = [[ManagerClient(addresses[n], LONG) for _ in range(2)] for n in ("x", "y", "z")]
    rank0, rank1 = groups[2]
    single = ManagerClient(addresses["single"], LONG)
    ids = []

    def ask(client: ManagerClient, rank: int, step: int, failures: int = 0, **more: object) -> object:
        result = client._quorum(
            group_rank=rank,
            step=step,
            checkpoint_metadata=f"metadata of rank {rank}",
            shrink_only=False,
            timeout=more.get("timeout", LONG),
            init_sync=more.get("init_sync", True),
            commit_failures=failures,
        )
        ids.append(result.quorum_id)
        fields = {f: getattr(result, f) for f in FIELDS}
        fields["recover_src_manager_address"] = names.get(fields["recover_src_manager_address"], "")
        return fields

    def all_ask(steps: tuple[int, int, int], failures: int = 0, **more: object) -> object:
        return together(
            *(
                partial(ask, client, rank, step, failures, **more)
                for clients, step in zip(groups, steps, strict=True)
                for rank, client in enumerate(clients)
            )
        )

    answers: dict[str, object] = {}
    answers["fresh start"] = all_ask((0, 0, 0))
    answers["fresh start without init_sync"] = all_ask((0, 0, 0), init_sync=False)
    answers["one behind"] = all_ask((7, 3, 7))
    same = max(ids)
    answers["all level"] = all_ask((8, 8, 8))
    answers["the id stands while nothing changes"] = max(ids) == same
    answers["after a step that failed"] = all_ask((8, 8, 8), failures=1)
    answers["the id grows after a failed step"] = max(ids) > same
    answers["metadata"] = outcome(lambda: rank0._checkpoint_metadata(1, LONG))
    answers["metadata of no rank"] = outcome(lambda: rank0._checkpoint_metadata(9, LONG))
    answers["vote of one"] = [single.should_commit(0, 8, v, LONG) for v in (True, False)]
    for first, second in ((True, True), (True, False), (False, False)):
        answers[f"vote {first} {second}"] = together(
            lambda v=first: rank0.should_commit(0, 8, v, LONG), lambda v=second: rank1.should_commit(1, 8, v, LONG)
        )
    answers["one rank of two asks"] = outcome(lambda: ask(rank0, 0, 7, timeout=SHORT))
    answers["one of two votes"] = outcome(lambda: rank0.should_commit(0, 8, True, SHORT))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--managers", type=json.loads, default={})
    args = parser.parse_args()
    hello()
    if args.watch:
        watch(args.lighthouse)
    else:
        said = {"lighthouse": lighthouse(args.lighthouse)}
        if args.managers:
            said["managers"] = managers(args.managers)
        say("answers", **said)


if __name__ == "__main__":
    main()
