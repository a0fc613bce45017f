"""What goes wrong in a run: a list of faults, by time or when a protocol point is passed.

A schedule is a text that a person can read, change and run again (``torchft simulate --replay FILE``)::

    seed 42
    settings replicas=3 lease=4
    at 2.25 kill g1                        # SIGKILL; its streams close
    at 2.25 vanish g1                      # its machine is gone: nothing closes, nothing refuses
    at 3 start g1                          # again, or g9 for the first time
    at 3 pause g2 for 1.7                  # SIGSTOP, then SIGCONT; also of L0, or of leader: the one that leads
    at 4 crash L0 for 0.5                  # it is started again after that
    at 5 cut g0 L0 for 2                   # both directions; oneway g0 L0: only what g0 says is lost
    at 5 lose g0 L0                        # their connection breaks, once, and what was under way is lost
    at 6 late g0 L0 for 1 by 0.3           # messages take 0.3 s more
    at 6 slow g1 for 2 by 6                # steps take 6 times as long
    at 7 leave g1                          # it drains
    at 7 shrink g1                         # its next request is shrink_only
    at 7 report g1                         # somebody says that it is dead
    on commit 7 +0.01 kill ~               # when the 7th commit has happened; ~ is who was there

Faults that would do nothing (a dead one is killed again) do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchft.testing.simulation.settings import Settings

if TYPE_CHECKING:
    from torchft.testing.simulation.job import Job

__all__ = ["HERE", "KINDS", "LEADER", "Acts", "Fault", "Schedule", "When", "install"]

LEADER = "leader"
"""As a name: the lighthouse that leads then."""
HERE = "~"
"""As a name: who passed the protocol point."""


@dataclass(frozen=True)
class When:
    """A time, or a moment after a protocol point."""

    at: float
    """True time in seconds; with ``point`` so long after it was passed."""
    point: str = ""
    """The protocol point that is waited for; empty: none."""
    nth: int = 0
    """Which passing of the point, counted from 1."""

    def later(self, seconds: float) -> When:
        """So much later."""
        return replace(self, at=round(self.at + seconds, 4))

    def text(self) -> str:
        """As it is written."""
        return f"on {self.point.replace(' ', '_')} {self.nth} +{self.at:g}" if self.point else f"at {self.at:g}"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    when: When
    kind: str
    who: str
    other: str = ""
    seconds: float = 0.0
    """How long it lasts."""
    by: float = 0.0
    """How much: see the kinds."""

    def text(self) -> str:
        """One line, as :meth:`Schedule.parse` reads it."""
        words = [self.when.text(), self.kind, self.who, self.other]
        if self.seconds:
            words.append(f"for {self.seconds:g}")
        if self.by:
            words.append(f"by {self.by:g}")
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Schedule:
    """A run, whole: the same schedule gives the same run."""

    seed: int
    settings: Settings
    faults: tuple[Fault, ...]

    def text(self) -> str:
        """As :meth:`parse` reads it."""
        lines = [f"seed {self.seed}", f"settings {self.settings.text()}".strip(), *(f.text() for f in self.faults)]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Reads what :meth:`text` wrote, or a person.

        Raises:
            ValueError: a line is not one. The message has the line and says what there is.
        """
        seed, settings, faults = 0, Settings(), []
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.partition("#")[0].strip()
            if not line:
                continue
            try:
                if line.startswith("seed "):
                    seed = int(line[5:])
                elif line.split()[0] == "settings":
                    settings = Settings.parse(line[8:])
                else:
                    faults.append(_fault(line.split()))
            except IndexError:
                raise ValueError(f"line {number}, {line!r}: it is cut short. {_FORM}") from None
            except ValueError as e:
                raise ValueError(f"line {number}, {line!r}: {e}. {_FORM}") from None
        return cls(seed, settings, tuple(faults))


_FORM = (
    "A line is: seed N | settings name=value … | (at SECONDS | on POINT NTH +SECONDS) KIND WHO [OTHER] [for S] [by X]"
)


def _fault(words: list[str]) -> Fault:
    if words[0] == "at":
        when, rest = When(float(words[1])), words[2:]
    elif words[0] == "on":
        when, rest = When(float(words[3]), words[1].replace("_", " "), int(words[2])), words[4:]
    else:
        raise ValueError(f"it begins with {words[0]!r}")
    values = {"for": 0.0, "by": 0.0}
    names = []
    kind, rest = rest[0], rest[1:]
    while rest:
        if rest[0] in values:
            values[rest[0]] = float(rest[1])
            rest = rest[2:]
        else:
            names.append(rest.pop(0))
    if kind not in KINDS:
        raise ValueError(f"there is no fault {kind!r}; there are: {', '.join(sorted(KINDS))}")
    if len(names) != (2 if kind in _OF_TWO else 1):
        raise ValueError(f"{kind} is of {'two' if kind in _OF_TWO else 'one'}, not of {names}")
    return Fault(when, kind, names[0], names[1] if len(names) > 1 else "", values["for"], values["by"])


class Acts:
    """The faults, carried out on a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.world = job.world
        self.over = 0.0
        """When the last fault that has begun so far ends."""

    def carry_out(self, fault: Fault, who: str) -> None:
        """The fault happens now."""
        name, other = self._named(fault.who, who), self._named(fault.other, who)
        if fault.kind in _OF_GROUPS and name in self.job.lighthouses:
            name = "g0"
        self.world.seen[f"fault {fault.kind}"] += 1
        if self.world.trace is not None:
            self.world.tell("*", "%s", replace(fault, who=name, other=other).text())
        self.over = max(self.over, self.world.now + fault.seconds)
        KINDS[fault.kind](self, name, other, fault)

    def _named(self, name: str, here: str) -> str:
        if name == LEADER:
            lead = (
                n
                for n, lighthouse in self.job.lighthouses.items()
                if lighthouse.process.alive and lighthouse.seat.epoch
            )
            return next(lead, "L0")
        return here if name == HERE else name

    def _later(self, seconds: float, function: Callable[..., object], *args: object) -> None:
        self.world.at(self.world.now + seconds, function, *args)

    def kill(self, name: str, other: str, fault: Fault) -> None:
        """SIGKILL of a group, or of one of its other ranks (``g1/1``)."""
        group, _, rank = name.partition("/")
        if rank:
            self.job.kill_rank(self.job.group(group), int(rank))
            self.over = max(self.over, self.world.now + 0.5)
        else:
            self.job.kill(self.job.group(group))

    def vanish(self, name: str, other: str, fault: Fault) -> None:
        """Its machine is gone: nothing closes, and nothing refuses."""
        self.job.kill(self.job.group(name.partition("/")[0]), host=True)

    def start(self, name: str, other: str, fault: Fault) -> None:
        """It is started, again or for the first time."""
        self.job.start_group(self.job.group(name.partition("/")[0]))

    def pause(self, name: str, other: str, fault: Fault) -> None:
        """SIGSTOP for a while."""
        process = self.job.process(name)
        if not process.alive or process.paused:
            return
        life = process.life
        process.pause()
        self.job.network.look_for_silence()
        self._later(fault.seconds, self._resume, name, life)

    def _resume(self, name: str, life: int) -> None:
        process = self.job.process(name)
        if process.life == life:
            self.world.tell("*", "%s goes on", name)
            process.resume()
            self.job.network.look_for_silence()

    def crash(self, name: str, other: str, fault: Fault) -> None:
        """SIGKILL of a lighthouse, which is started again after a while."""
        lighthouse = self.job.lighthouses.get(name)
        if lighthouse is None or not lighthouse.process.alive:
            return
        lighthouse.crash()
        self._later(fault.seconds, lighthouse.start)

    def cut(self, name: str, other: str, fault: Fault) -> None:
        """Nothing gets through between the two, for a while."""
        self.oneway(name, other, fault)
        self.oneway(other, name, fault)

    def oneway(self, name: str, other: str, fault: Fault) -> None:
        """Nothing that the first says gets to the second, for a while."""
        self.job.network.cut(name, other)
        self._later(fault.seconds, self.job.network.mend, name, other)

    def lose(self, name: str, other: str, fault: Fault) -> None:
        """The connections between the two break."""
        self.job.network.break_streams(name, other)

    def late(self, name: str, other: str, fault: Fault) -> None:
        """Messages between the two take ``by`` seconds more, for a while."""
        for pair in ((name, other), (other, name)):
            self.job.network.delay(*pair, fault.by)
            self._later(fault.seconds, self.job.network.delay, *pair, 0.0)

    def slow(self, name: str, other: str, fault: Fault) -> None:
        """Its steps take ``by`` times as long, for a while."""
        for trainer in self.job.group(name.partition("/")[0]).trainers:
            trainer.slowness = fault.by
            self._later(fault.seconds, setattr, trainer, "slowness", 1.0)
        self.over = max(self.over, self.world.now + fault.seconds + fault.by * self.job.settings.step_time)

    def leave(self, name: str, other: str, fault: Fault) -> None:
        """It drains."""
        for trainer in self.job.group(name.partition("/")[0]).trainers[:1]:
            trainer.draining = True

    def shrink(self, name: str, other: str, fault: Fault) -> None:
        """Its next request is shrink_only."""
        for trainer in self.job.group(name.partition("/")[0]).trainers:
            trainer.shrink_once = True

    def report(self, name: str, other: str, fault: Fault) -> None:
        """Somebody says that it is dead."""
        group = self.job.group(name.partition("/")[0])
        for lighthouse in self.job.lighthouses.values():
            if group.server is not None and lighthouse.process.alive:
                self.world.to(lighthouse.process, 0.001, lighthouse.reported, group.server.replica_id)


KINDS: dict[str, Callable[[Acts, str, str, Fault], None]] = {
    "kill": Acts.kill,
    "vanish": Acts.vanish,
    "start": Acts.start,
    "pause": Acts.pause,
    "crash": Acts.crash,
    "cut": Acts.cut,
    "oneway": Acts.oneway,
    "lose": Acts.lose,
    "late": Acts.late,
    "slow": Acts.slow,
    "leave": Acts.leave,
    "shrink": Acts.shrink,
    "report": Acts.report,
}
"""All kinds of faults."""

_OF_TWO = ("cut", "oneway", "lose", "late")
_OF_GROUPS = ("kill", "vanish", "start", "slow", "leave", "shrink", "report")


def install(schedule: Schedule, job: Job) -> Acts:
    """Sees to it that the faults of a schedule happen to a job that is about to start."""
    acts = Acts(job)
    waiting: dict[tuple[str, int], list[Fault]] = {}
    counts: dict[str, int] = {}
    for fault in schedule.faults:
        when = fault.when
        if when.point:
            waiting.setdefault((when.point, when.nth), []).append(fault)
            counts[when.point] = 0
        else:
            job.world.at(when.at, acts.carry_out, fault, "")

    def on_point(name: str, who: str) -> None:
        if name in counts:
            counts[name] += 1
            for fault in waiting.pop((name, counts[name]), ()):
                if job.world.now < schedule.settings.duration:
                    job.world.at(job.world.now + fault.when.at, acts.carry_out, fault, who)

    if waiting:
        job.world.on_point = on_point
    return acts
