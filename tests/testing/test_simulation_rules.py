"""What the simulation is worth: each safety rule is taken out of the real core, and the simulation has to notice.

A rule whose absence nobody notices is either not tested or not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from torchft.core.assignment import View, assign
from torchft.core.election import Candidate, Ended
from torchft.core.membership import Member, Options, Quorum
from torchft.core.standing import Ack, Announcement, Decide, Orders
from torchft.core.standing_lighthouse import StandingLighthouse
from torchft.core.standing_member import MayCommit, StandingMember
from torchft.testing.simulation import Parts, minimal, run, run_seed
from torchft.testing.simulation.trainer import Trainer

SEEDS = 1500
"""The most schedules that the simulation gets to notice that a rule is missing. It mostly needs far fewer."""


class TakesOverAtOnce(StandingLighthouse):
    """A quorum without any member of the last one forms without waiting for their lease."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.membership._not_over = lambda now: None  # type: ignore[method-assign]


class AdoptsNothing(StandingLighthouse):
    """A restarted lighthouse listens to no announcement, and knows nothing of the last quorum."""

    def __init__(self, options: Options, quorum_id: int, now: float, **before: Any) -> None:
        super().__init__(options, quorum_id, now)

    def attach(self, replica_id: str, active: bool, now: float, announced: Announcement | None = None) -> Orders:
        return super().attach(replica_id, active, now)


class ForgetsTheLastQuorum(StandingLighthouse):
    """A restarted lighthouse waits for announcements, but its record has nothing but the epoch."""

    def __init__(self, *args: Any, last: Quorum | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class UsesIdsTwice(AdoptsNothing):
    """Nor does it have an epoch."""

    def __init__(self, options: Options, quorum_id: int, now: float, **before: Any) -> None:
        super().__init__(options, 0, now)


class DecidesTooEarly(StandingLighthouse):
    """The agreed step is one that members may have started."""

    def ack(self, replica_id: str, number: int, step: int, now: float) -> Orders:
        return super().ack(replica_id, number, step - 2, now)


class KeepsTheId(StandingLighthouse):
    """A quorum that a member could not go on with lends its id to the next one."""

    def request(self, member: Member, now: float) -> Orders:
        return super().request(replace(member, commit_failures=0), now)


class StandsWithoutLease(StandingMember):
    """A member goes on however long the lighthouse does not answer."""

    def _limit(self) -> float:
        return 1e9


class StandsAloneForLong(StandingMember):
    """A member alone in its quorum has as long a lease as several."""

    def _limit(self) -> float:
        return self._lease


class CommitsAfterItsLease(StandingMember):
    """The lease is looked at before a step, not before its commit."""

    def commit(self, now: float) -> MayCommit:
        return MayCommit.YES


class IgnoresDecisions(StandingMember):
    """A member does not ask at the step that was agreed on."""

    def decide(self, message: Decide) -> Ack | None:
        ack = super().decide(message)
        self._until = None
        return ack


class NeverDeposed(Candidate):
    """A leader whose lease ran out answers on."""

    def leads(self, now: float) -> bool:
        return self._reign is not None

    def tick(self, now: float) -> Ended | None:
        return None

    def told(self, epoch: int, now: float) -> Ended | None:
        return None

    def renewed(self, granted: bool, sent_at: float, now: float) -> Ended | None:
        if self._reign is not None:
            self._reign.renew_at = now + self.options.renewing
        return None


def assign_by_step_alone(quorum: Quorum, replica_id: str, group_rank: int, init_sync: bool) -> View:
    """Equal steps are taken for equal states."""
    members = tuple(replace(m, lineage=0) for m in quorum.participants)
    return assign(replace(quorum, participants=members), replica_id, group_rank, init_sync)


class ServesHalfAState(Trainer):
    """A replica whose heal did not end well goes on with what it has."""

    @property
    def usable(self) -> bool:
        return True

    @usable.setter
    def usable(self, value: bool) -> None:
        pass


class DividesByAll(Trainer):
    """Who heals divides by all members, as in a synchronous quorum."""

    def _enter(self, attempt: int, view: View) -> None:
        super()._enter(attempt, view)
        if view.heal:
            self._next_part = replace(self._next_part, world_size=view.replica_world_size)


class WaitsForEver(Trainer):
    """A collective has no timeout."""

    def _collective_timeout(self, attempt: int) -> None:
        pass


@dataclass(frozen=True)
class Rule:
    """One that is taken out, and what breaks without it."""

    parts: Parts
    breaks: Sequence[int]
    stories: Sequence[str] = ()
    """The faults that it is for."""


RULES = {
    "a takeover waits for the lease": Rule(Parts(lighthouse=TakesOverAtOnce), [2], ["all replaced"]),
    "a restarted lighthouse adopts": Rule(
        Parts(lighthouse=AdoptsNothing), [2], ["all replaced", "lighthouse crashed", "cut off"]
    ),
    "the last quorum is on record": Rule(Parts(lighthouse=ForgetsTheLastQuorum), [2], ["all replaced"]),
    "ids are used once": Rule(Parts(lighthouse=UsesIdsTwice), [5], ["lighthouse crashed", "killed", "joined"]),
    "the agreed step is beyond all that were started": Rule(Parts(lighthouse=DecidesTooEarly), [6], ["joined", "lost"]),
    "a broken quorum's id ends with it": Rule(Parts(lighthouse=KeepsTheId), [6]),
    "standing needs a lease": Rule(Parts(member=StandsWithoutLease), [2], ["all replaced", "cut off", "joined"]),
    "a lone member's lease is short": Rule(
        Parts(member=StandsAloneForLong), [2], ["all replaced", "cut off", "paused", "joined"]
    ),
    "a commit needs the lease": Rule(Parts(member=CommitsAfterItsLease), [2], ["all replaced", "paused", "joined"]),
    "members ask at the agreed step": Rule(Parts(member=IgnoresDecisions), [6], ["joined"]),
    "a leader's right ends with its lease": Rule(Parts(candidate=NeverDeposed), [2, 6], ["leader cut off"]),
    "equal steps need equal lineages": Rule(Parts(assign=assign_by_step_alone), [4]),
    "half a state is no state": Rule(Parts(trainer=ServesHalfAState), [4]),
    "all divide by the participants": Rule(Parts(trainer=DividesByAll), [1], ["joined"]),
    "every wait has a deadline": Rule(Parts(trainer=WaitsForEver), [6, 7], ["split", "paused"]),
}


@pytest.mark.parametrize("name", RULES)
def test_without_the_rule_the_simulation_fails(name: str) -> None:
    rule = RULES[name]
    for seed in range(SEEDS):
        violation = run_seed(seed, (2, 4), rule.stories, rule.parts).violation
        if violation is not None:
            break
    else:
        pytest.fail(f"nothing was noticed in {SEEDS} schedules")
    assert violation.invariant in rule.breaks, str(violation)
    assert run_seed(seed, (2, 4), rule.stories).violation is None, "with the rule the same schedule is all right"


def test_a_failing_schedule_is_made_small_and_can_be_run_again_from_its_text() -> None:
    parts = Parts(lighthouse=TakesOverAtOnce)
    results = (run_seed(seed, (4, 4), ["all replaced"], parts) for seed in range(SEEDS))
    failed = next(result for result in results if result.violation is not None and len(result.schedule.faults) > 8)
    smallest = minimal(failed, parts)
    assert smallest.violation is not None
    assert smallest.violation.invariant == 2
    assert len(smallest.schedule.faults) < len(failed.schedule.faults) / 2
    assert smallest.schedule.settings.replicas <= failed.schedule.settings.replicas
    assert smallest.trace is not None
    assert smallest.trace.lines[-1][2].startswith("VIOLATION") or "VIOLATION" in smallest.trace.text(5)
    again = run(type(smallest.schedule).parse(smallest.schedule.text()), parts)
    assert again.violation == smallest.violation
    assert run(smallest.schedule).violation is None
