"""Schedules by chance: what is drawn, and how often, so that the dangerous interleavings are met.

The idea
    Faults at random times seldom meet the short moments that matter. So half of them wait for a protocol point
    instead (a prepare, a decision, a commit of some of the members, a takeover), and happen right after it to whom
    it concerns; and faults come in *stories*: a cut outlasts a lease, a lighthouse comes back while members are cut
    off, a member is stopped just as long as it takes to be given up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torchft.testing.simulation.faults import HERE, LEADER, Fault, Schedule, When
from torchft.testing.simulation.seat import REGISTER
from torchft.testing.simulation.settings import Settings

__all__ = ["STORIES", "generate"]

_POINTS = {
    "first commit": 25,
    "commit": 60,
    "quorum": 6,
    "heal": 3,
    "failed step": 6,
    "prepare": 3,
    "ack": 6,
    "decide": 3,
    "adoption": 1,
    "takeover": 1,
}
"""Protocol points that faults wait for, and how often each is passed in a run, more or less."""
_OF_GROUPS = ("first commit", "commit", "heal", "failed step", "ack")


class _Draw:
    """One schedule in the making."""

    def __init__(self, seed: int, replicas: tuple[int, int], stories: Sequence[str]) -> None:
        self.rng = rng = random.Random(f"{seed} schedule")
        self.settings = self._settings(replicas)
        self.groups = [f"g{i}" for i in range(self.settings.replicas)]
        self.lighthouses = [f"L{i}" for i in range(self.settings.lighthouses)]
        self.faults: list[Fault] = []
        tells, weights = zip(*(STORIES[name] for name in stories), strict=True)
        for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5))):
            rng.choices(tells, weights)[0](self)

    def _settings(self, replicas: tuple[int, int]) -> Settings:
        rng = self.rng
        groups = rng.randint(*replicas)
        return Settings(
            replicas=groups,
            ranks=2 if rng.random() < 0.1 else 1,
            lighthouses=rng.choice((2, 2, 3)) if rng.random() < 0.25 else 1,
            min_replicas=2 if groups > 2 and rng.random() < 0.2 else 1,
            fixed_with_spares=groups > 2 and rng.random() < 0.1,
            min_replica_size=2 if groups > 2 and rng.random() < 0.2 else 1,
            async_quorum=rng.random() < 0.6,
            init_sync=rng.random() < 0.9,
        )

    # ------------------------------------------------------------- choosing

    def group(self) -> str:
        return self.rng.choice(self.groups)

    def lighthouse(self) -> str:
        several = len(self.lighthouses) > 1
        return LEADER if several and self.rng.random() < 0.6 else self.rng.choice(self.lighthouses)

    def when(self) -> When:
        """A time, or a point and a moment after it."""
        rng = self.rng
        if rng.random() < 0.5:
            return When(round(rng.uniform(0.0, 0.8) * self.settings.duration, 3))
        point = rng.choice(list(_POINTS))
        return When(round(rng.random() ** 3 * 0.2, 4), point, 1 + int(rng.random() * _POINTS[point]))

    def span(self) -> float:
        """A duration: short, about the heartbeat timeout, or about the lease."""
        settings, rng = self.settings, self.rng
        about = rng.choice(
            (0.2, settings.heartbeat_timeout, settings.lease, settings.lease + settings.heartbeat_timeout)
        )
        return round(about * rng.uniform(0.6, 1.3), 3)

    def add(self, when: When, kind: str, who: str, other: str = "", seconds: float = 0.0, by: float = 0.0) -> None:
        self.faults.append(Fault(when, kind, who, other, seconds, by))

    def who(self, when: When) -> str:
        """A group; often the one that the point is about."""
        return HERE if when.point in _OF_GROUPS and self.rng.random() < 0.5 else self.group()

    # --------------------------------------------------------------- stories

    def killed(self) -> None:
        when, rng = self.when(), self.rng
        who = self.who(when)
        self.add(when, "vanish" if rng.random() < 0.2 else "kill", who)
        if who != HERE:
            self.add(when.later(rng.choice((0.05, 0.5, 1.5, 3.0)) * rng.uniform(0.5, 1.5)), "start", who)

    def rank_killed(self) -> None:
        if self.settings.ranks > 1:
            self.add(self.when(), "kill", f"{self.group()}/1")
        else:
            self.killed()

    def paused(self) -> None:
        when = self.when()
        self.add(when, "pause", self.who(when), seconds=self.span())

    def joined(self) -> None:
        self.join(self.when())

    def join(self, when: When) -> None:
        """A group that is not there yet."""
        name = f"g{len(self.groups)}"
        self.add(when, "start", name)
        self.groups.append(name)

    def left(self) -> None:
        when, who = self.when(), self.group()
        self.add(when, "leave", who)
        if self.rng.random() < 0.5:
            self.add(when.later(self.rng.uniform(0.5, 3.0)), "start", who)

    def lighthouse_crashed(self) -> None:
        self.add(self.when(), "crash", self.lighthouse(), seconds=self.span())

    def lighthouse_paused(self) -> None:
        self.add(self.when(), "pause", self.lighthouse(), seconds=self.span())

    def leader_cut_off(self) -> None:
        """The lighthouse that leads loses the register, and perhaps keeps the groups that are in, while others come."""
        if self.settings.lighthouses == 1:
            self.lighthouse_crashed()
            return
        when, rng, settings = self.when(), self.rng, self.settings
        seconds = self.span() + rng.choice((0.0, settings.seat_lease, settings.lease + settings.heartbeat_timeout))
        pair = (LEADER, REGISTER) if rng.random() < 0.5 else (REGISTER, LEADER)
        self.add(when, "oneway" if rng.random() < 0.3 else "cut", *pair, seconds=seconds)
        if rng.random() < 0.5:
            for who in self.groups:
                for lighthouse in self.lighthouses[1:]:
                    self.add(when, "cut", who, lighthouse, seconds=seconds)
        if rng.random() < 0.5:
            self.join(when.later(rng.uniform(0.0, 3.0)))

    def cut_off(self) -> None:
        """Some of the groups lose the lighthouse."""
        when, rng, seconds = self.when(), self.rng, self.span()
        kind = "oneway" if rng.random() < 0.3 else "cut"
        for who in rng.sample(self.groups, rng.randint(1, len(self.groups))):
            pair = (who, self.lighthouse()) if rng.random() < 0.5 else (self.lighthouse(), who)
            self.add(when, kind, *pair, seconds=seconds)
        if rng.random() < 0.4:
            rng.choice((self.joined, self.killed, self.lighthouse_crashed))()

    def split(self) -> None:
        """The groups fall into two parts that do not see each other."""
        when, rng, seconds = self.when(), self.rng, self.span()
        if len(self.groups) < 2:
            return
        mine = rng.sample(self.groups, rng.randint(1, len(self.groups) - 1))
        for one in mine:
            for other in self.groups:
                if other not in mine:
                    self.add(when, "oneway" if rng.random() < 0.2 else "cut", one, other, seconds=seconds)
            if rng.random() < 0.5:
                self.add(when, "cut", one, self.lighthouse(), seconds=seconds)

    def parted(self) -> None:
        """One commits a step that the others give up, and is away until they have gone on without it."""
        rng, settings = self.rng, self.settings
        when = When(0.0, "first commit", 1 + int(rng.random() * _POINTS["first commit"]))
        self.add(when, rng.choice(("kill", "vanish", "report")), self.group())
        seconds = settings.heartbeat_timeout * rng.uniform(0.9, 1.3) + settings.step_time * rng.uniform(0.0, 3.0)
        self.add(when, "pause", HERE, seconds=round(seconds, 3))

    def lost(self) -> None:
        when = self.when()
        for _ in range(self.rng.randint(1, 3)):
            self.add(when, "lose", self.group(), self.lighthouse())

    def late(self) -> None:
        by = round(self.rng.choice((0.05, 0.3, 1.0)) * self.rng.uniform(0.5, 1.5), 3)
        self.add(self.when(), "late", self.group(), self.lighthouse(), seconds=self.span(), by=by)

    def slow(self) -> None:
        self.add(self.when(), "slow", self.group(), seconds=self.span(), by=round(self.rng.uniform(2, 10), 1))

    def told(self) -> None:
        self.add(self.when(), self.rng.choice(("shrink", "report")), self.group())

    def all_replaced(self) -> None:
        """All that are in are stopped, cut off or gone, and another one comes."""
        when, rng = self.when(), self.rng
        for who in list(self.groups):
            kind = rng.choice(("cut", "cut", "pause", "kill", "vanish"))
            seconds = 0.0 if kind in ("kill", "vanish") else round(self.settings.lease * rng.uniform(0.3, 1.6), 3)
            self.add(when, kind, who, self.lighthouse() if kind == "cut" else "", seconds=seconds)
        self.join(when.later(rng.uniform(0.0, 1.0)))
        if rng.random() < 0.4:
            seconds = rng.choice((0.1, 0.5, 2.0))
            self.add(when.later(rng.uniform(0.0, 1.0)), "crash", self.lighthouse(), seconds=seconds)


STORIES: dict[str, tuple[Callable[[_Draw], None], int]] = {
    "killed": (_Draw.killed, 5),
    "rank killed": (_Draw.rank_killed, 1),
    "paused": (_Draw.paused, 4),
    "joined": (_Draw.joined, 4),
    "left": (_Draw.left, 2),
    "lighthouse crashed": (_Draw.lighthouse_crashed, 3),
    "lighthouse paused": (_Draw.lighthouse_paused, 2),
    "leader cut off": (_Draw.leader_cut_off, 2),
    "cut off": (_Draw.cut_off, 4),
    "split": (_Draw.split, 2),
    "parted": (_Draw.parted, 3),
    "lost": (_Draw.lost, 2),
    "late": (_Draw.late, 2),
    "slow": (_Draw.slow, 1),
    "told": (_Draw.told, 1),
    "all replaced": (_Draw.all_replaced, 4),
}
"""Each story and its weight among all."""


def generate(seed: int, replicas: tuple[int, int] = (2, 6), stories: Sequence[str] = ()) -> Schedule:
    """The schedule of a seed.

    Args:
        seed: of this and of the run.
        replicas: the fewest and the most groups at the beginning.
        stories: of these only, by their names in :data:`STORIES`; empty: of all.

    Raises:
        ValueError: there is no such story.
    """
    unknown = [name for name in stories if name not in STORIES]
    if unknown:
        raise ValueError(f"there is no story {unknown[0]!r}; there are: {', '.join(STORIES)}")
    draw = _Draw(seed, replicas, stories or tuple(STORIES))
    return Schedule(seed, draw.settings, tuple(draw.faults))
