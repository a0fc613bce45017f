"""A lighthouse in a process of its own, which runs until it is told to stop."""

import argparse

from report import hello, say

from torchft.coordination import LighthouseServer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("min_replicas", type=int)
    parser.add_argument("join_timeout_ms", type=int)
    parser.add_argument("heartbeat_timeout_ms", type=int)
    parser.add_argument("--bind", default="[::]:0")
    parser.add_argument("--ha")
    parser.add_argument("--state-file")
    args = parser.parse_args()
    stop = hello()
    more = {}
    if args.ha is not None:  # what only some have
        more["ha"] = args.ha
    if args.state_file is not None:
        more["state_file"] = args.state_file
    server = LighthouseServer(
        bind=args.bind,
        min_replicas=args.min_replicas,
        join_timeout_ms=args.join_timeout_ms,
        heartbeat_timeout_ms=args.heartbeat_timeout_ms,
        **more,
    )
    say("address", address=server.address())
    while args.ha is not None and not stop.wait(0.001):
        if server.epoch:
            say("leads", epoch=server.epoch)
            break
    stop.wait()
    server.shutdown()


if __name__ == "__main__":
    main()
