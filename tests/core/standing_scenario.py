"""Events of scenario files for :mod:`torchft.core.standing_lighthouse` and :mod:`torchft.core.standing_member`.

The lighthouse (times in ms; steps and numbers as ``name=value``)::

    lighthouse min_replicas=1 heartbeat_timeout=5 lease=300 restarted=true quorum_id=7 last=A,B      a new one
    hello A | hello A quorum=7 rank=0 size=2 step=12 stands=true     a session begins, with or without announcement
    bye A               it ended, nobody knows why
    ask A step=3 lineage=7 uses=7 commit_failures=1 session=false | unask A | ack A change=1 step=4 | drain A
    beat? A             a sign of life, and what it is answered
    died A cause... | gone A 7 cause...       known to be dead; 7: it left before that step
    wait 500            time passes and it is told | due

A member::

    member A            a new one, with the lease and the heartbeat timeout of ``welcome``
    welcome lease=300 heartbeat_timeout=5 quorum=0        the answer to a hello that was sent now
    enter 7 rank=0 size=2 step=3 fenced=true stands=true  the answer to a question that was sent now
    start 4 | commit? | end 4 yes | end 4 no | uses 5
    prepare 1 7 | decide 1 7 step=9 | over 7 cause... | notice since=3 upto=7 cause... | lost
    beat! | heard 1 quorum=7      a sign of life is sent; its answer
    announce            what its next hello says
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torchft.core.membership import Member, Options, Quorum
from torchft.core.standing import Ack, Announcement, Decide, Message, Orders, Over, Prepare
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.core.standing_member import Grant, StandingMember

if TYPE_CHECKING:
    from tests.core.scenario import Event, Runner

__all__ = ["Standing"]


class Standing:
    """The machines of one file, and their verbs."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lighthouse: StandingLighthouse | None = None
        self._member: StandingMember | None = None
        self.verbs: dict[str, Callable[[Event], list[str]]] = {
            "lighthouse": self._new_lighthouse,
            "hello": lambda e: self._orders(
                self._l.attach(e.words[0], "quorum" in e.options, self._now, _announced(e))
            ),
            "bye": lambda e: self._orders(self._l.detach(e.words[0], self._now)),
            "ask": lambda e: self._orders(self._l.request(_asking(e), self._now)),
            "unask": lambda e: self._orders(self._l.withdraw(e.words[0], self._now)),
            "ack": lambda e: self._orders(
                self._l.ack(e.words[0], int(e.options["change"]), int(e.options["step"]), self._now)
            ),
            "drain": lambda e: self._orders(self._l.drain(e.words[0], self._now)),
            "beat?": lambda e: [f"the newest quorum is {self._l.beat(e.words[0], self._now)}"],
            "died": lambda e: self._orders(self._l.failed(e.words[0], e.rest, self._now)),
            "gone": lambda e: self._orders(
                self._l.failed(e.words[0], e.rest.partition(" ")[2], self._now, int(e.words[1]))
            ),
            "wait": self._wait,
            "due": lambda e: [f"due at {self._l.due()}"],
            "member": self._new_member,
            "welcome": self._welcome,
            "enter": self._enter,
            "start": self._start,
            "commit?": lambda e: [self._m.commit(self._now).value],
            "end": self._end,
            "uses": lambda e: [f"uses {self._m.uses(int(e.words[0]))}"],
            "prepare": lambda e: _ack(self._m.prepare(Prepare(int(e.words[0]), int(e.words[1])))),
            "decide": lambda e: _ack(self._m.decide(Decide(int(e.words[0]), int(e.words[1]), int(e.options["step"])))),
            "over": lambda e: [f"concerns it: {self._m.over(Over(int(e.words[0]), e.rest))}"],
            "notice": lambda e: [
                f"concerns it: {self._m.notice(int(e.options['since']), int(e.options['upto']), ' '.join(e.words))}"
            ],
            "lost": self._lost,
            "beat!": lambda e: [f"beat {self._m.beat(self._now)}"],
            "heard": self._heard,
            "announce": lambda e: [str(self._m.announcement())],
        }

    @property
    def _now(self) -> float:
        return self._runner.now / 1000

    @property
    def _l(self) -> StandingLighthouse:
        assert self._lighthouse is not None, "the file has no 'lighthouse' line before this one"
        return self._lighthouse

    @property
    def _m(self) -> StandingMember:
        assert self._member is not None, "the file has no 'member' line before this one"
        return self._member

    # --------------------------------------------------------- lighthouse

    def _new_lighthouse(self, e: Event) -> list[str]:
        options = Options(
            min_replicas=int(e.options.get("min_replicas", "1")),
            join_timeout=float(e.options.get("join_timeout", "0.1")),
            heartbeat_timeout=float(e.options.get("heartbeat_timeout", "5")),
            lease=float(e.options.get("lease", "300")),
        )
        quorum_id = int(e.options.get("quorum_id", "0"))
        names = e.options.get("last", "")
        last = (
            Quorum(quorum_id, tuple(Member(n) for n in names.split(",")), fenced=True, stands=True) if names else None
        )
        restarted = e.options.get("restarted") == "true"
        self._lighthouse = StandingLighthouse(options, quorum_id, self._now, restarted, last)
        return []

    def _wait(self, e: Event) -> list[str]:
        self._runner.now += int(e.words[0])
        return self._orders(self._l.tick(self._now))

    def _orders(self, orders: Orders) -> list[str]:
        lines = [line for outcome in orders.outcomes for line in self._runner.told(outcome)]
        for outcome in orders.outcomes:
            if outcome.quorum is not None and outcome.quorum.stands:
                since = [self._l.membership.member_since(rid) for rid in outcome.quorum.replica_ids]
                lines.append(f"it stands: members since {since}")
        lines += [f"to {rid}: {_message(message)}" for rid, message in orders.tell]
        if orders.released:
            lines.append(f"go on, without a quorum: {' '.join(orders.released)}")
        return lines

    # ------------------------------------------------------------- member

    def _new_member(self, e: Event) -> list[str]:
        self._member = StandingMember()
        return self._welcome(e)

    def _welcome(self, e: Event) -> list[str]:
        o = e.options
        self._m.welcomed(
            float(o.get("lease", "300")), float(o.get("heartbeat_timeout", "5")), int(o.get("quorum", "0")), self._now
        )
        return []

    def _enter(self, e: Event) -> list[str]:
        o = e.options
        grant = Grant(
            int(e.words[0]),
            int(o.get("rank", "0")),
            int(o.get("size", "2")),
            o.get("fenced") != "false",
            o.get("stands") != "false",
        )
        self._m.entered(grant, int(o["step"]), self._now)
        return []

    def _start(self, e: Event) -> list[str]:
        start = self._m.start(int(e.words[0]), self._now)
        return ["it stands" if start.stands else f"ask: {start.why}"]

    def _end(self, e: Event) -> list[str]:
        if e.words[0].isdigit():
            self._m.ended(int(e.words[0]), e.words[1] == "yes")
            return []
        return self._runner.end(e)

    def _lost(self, e: Event) -> list[str]:
        self._m.lost()
        return []

    def _heard(self, e: Event) -> list[str]:
        self._m.beat_answered(int(e.words[0]), int(e.options["quorum"]))
        return []


def _announced(e: Event) -> Announcement | None:
    o = e.options
    if "quorum" not in o:
        return None
    return Announcement(int(o["quorum"]), int(o["rank"]), int(o["size"]), int(o["step"]), o.get("stands") != "false")


def _asking(e: Event) -> Member:
    o = e.options
    return Member(
        e.words[0],
        step=int(o.get("step", "0")),
        lineage=int(o.get("lineage", "0")),
        uses=int(o.get("uses", "0")),
        commit_failures=int(o.get("commit_failures", "0")),
        timed_out=o.get("timed_out") == "true",
        shrink_only=o.get("shrink_only") == "true",
        attempt=int(o.get("attempt", "0")),
        standing=o.get("session") != "false",
    )


def _message(message: Message) -> str:
    if isinstance(message, Prepare):
        return f"prepare change {message.change} of quorum {message.quorum_id}"
    if isinstance(message, Decide):
        return f"change {message.change} of quorum {message.quorum_id} at step {message.step}"
    return f"quorum {message.quorum_id} is over: {message.cause}"


def _ack(ack: Ack | None) -> list[str]:
    return [] if ack is None else [f"ack change {ack.change}: started {ack.step}"]
