"""How fast a state moves over HTTP between two processes, beside bare TCP in the same processes."""

from __future__ import annotations

import time

from benchmarks.cases.base import Case, Figures, Run
from benchmarks.cases.ends import Ends
from benchmarks.processes import CHILDREN, Cluster

__all__ = ["CASES"]

_ROUNDS = 8
"""The first is not counted: it goes into memory that nobody has touched. The others differ by a fifth now and then."""
_BEFORE = 2.0
"""Seconds that a crowd has asked before the source offers anything, as at step 0."""


def _transfer(run: Run, mib: int, count: int) -> Figures:
    ends = Ends(run, "transfer_http.py", mib, count, _ROUNDS)
    speed = ends.speed(warm=1)
    best = max(
        v for way, v in speed.items() if not way.startswith("raw") and way not in ("place, few", "place, socket")
    )
    figures: Figures = {
        "best way, GB/s": best,
        "not in place, GB/s": max(speed["fresh"], speed["chunks"]),
        "one TCP stream, GB/s": speed["raw1"],
        "two TCP streams, GB/s": speed["raw2"],
        "two TCP streams not paced, GB/s": speed["raw2 unpaced"],
        "of two TCP streams, fraction": best / speed["raw2"],
        "of two not paced, fraction": best / speed["raw2 unpaced"],
    }
    if "place" in speed:
        figures["in place, GB/s"] = speed["place"]
    if "place, few" in speed:
        figures["time in place, of 20 tensors' time, times"] = speed["place, few"] / speed["place"]
    if "place, socket" in speed:
        figures["in place over a Unix socket, GB/s"] = speed["place, socket"]
    if "place, tcp" in speed:
        figures["in place over TCP, GB/s"] = speed["place, tcp"]
        figures["over TCP of two TCP streams, fraction"] = speed["place, tcp"] / speed["raw2"]
    way = "place" if "place" in speed else "fresh"
    extra = ends.beyond(way) / ends.total
    figures[f"receiver's memory ({way}), states"] = 1 + extra - (0 if way == "place" else 1)
    figures[f"source's memory ({way}), states"] = 1 + ends.beyond(way, of_source=True) / ends.total
    figures["source's memory (fresh), states"] = 1 + ends.beyond("fresh", of_source=True) / ends.total
    return figures


def _sources(run: Run) -> Figures:
    mib, rate = (128 if run.quick else 1024), 200e6
    script = CHILDREN / "transfer_sources.py"
    with Cluster() as cluster:
        sources = [cluster.spawn(run.impl, script, "--mib", mib, "--rate", rate, name=f"source{i}") for i in range(2)]
        addresses = []
        for source in sources:
            source.hello()
            addresses.append(source.wait("source", 60)["address"])
        receiver = cluster.spawn(run.impl, script, "--mib", mib, "--sources", *addresses, name="receiver")
        receiver.hello()
        receiver.wait("half", 120)
        sources[1].kill()
        receiver.wait("over", 60)
        moved = {e["way"]: e for e in receiver.all("moved")}
        return {
            "one source, GB/s": (mib << 20) / moved["one"]["seconds"] / 1e9,
            "two sources, GB/s": (mib << 20) / moved["two"]["seconds"] / 1e9,
            "two as fast as so many, fraction": moved["one"]["seconds"] / moved["two"]["seconds"],
            "one of two killed at half, GB/s": (mib << 20) / moved["killed"]["seconds"] / 1e9,
            "fetched again then, share": moved["killed"]["again"],
        }


def _crowd(run: Run, count: int) -> Figures:
    script, processes = CHILDREN / "transfer_crowd.py", 4
    count = min(count, 40) if run.quick else count
    with Cluster() as cluster:
        source = cluster.spawn(run.impl, script, "--bytes", 4 << 20, name="source")
        source.hello()
        metadata = source.wait("source", 60)["metadata"]
        crowd = [
            cluster.spawn(run.impl, script, "--crowd", count // processes, "--metadata", metadata, name=f"crowd{i}")
            for i in range(processes)
        ]
        for child in crowd:
            child.hello()
        for child in crowd:
            child.wait("asking", 60)
        time.sleep(_BEFORE)
        source.tell("offer")
        offered = source.wait("offered", 10)["t"]
        done = sorted(t - offered for child in crowd for t in child.wait("over", 120)["done"])
        return {
            "served, fraction": len(done) / count,
            "the first half served, s": done[count // 2 - 1] if len(done) >= count // 2 else None,
            "all served, s": done[-1] if len(done) == count else None,
        }


def _case(name: str, mib: int, count: int) -> Case:
    about = f"{mib} MiB in {count} tensors by HTTPTransport, beside one and two bare TCP streams into warm memory"
    return Case(
        f"transfer-http-{name}",
        about,
        lambda run: _transfer(run, mib, count),
        target="best: 0.85 of two TCP streams, 2 of the peer; not in place: 1 of the peer",
        most=3,
    )


CASES = (
    _case("1024", 1024, 20),
    _case("4096", 4096, 20),
    _case("4096-many", 4096, 4000),
    Case(
        "transfer-sources",
        "1 GiB from one source of 200 MB/s, from two, and from two of which one is killed half way",
        _sources,
        target="two: 1.9 of one; fetched again: 0.05",
        only_ours=True,
    ),
    Case(
        "transfer-crowd-300",
        "300 receivers ask one source for 4 MiB by HTTPTransport, 2 s before it offers them",
        lambda run: _crowd(run, 300),
        target="served: 1",
        patience=60.0,
        most=1,
    ),
)
