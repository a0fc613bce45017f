"""Whether a replica that needs a state takes one in this step: not while it would come too slowly, for the others wait.

The idea
    The others stand while a state travels. So a replica finds out beside their steps whether that would be over
    soon: it says that it waits, contributes zeros, and measures the way to those who have the state on a thread of its
    own, which holds nobody up. Only the very first try, when nothing is known, happens within a step; it is given up
    after a fraction of a second if it is hopeless, and if that was a mistake the measurement says so a second later.

    What may be called soon grows with the time that it has waited (:mod:`torchft.core.heal_allowance`), so that a slow
    way costs the others a small share of their time, and this group is not shut out, unless the way is so slow that
    it must be a fault. Where the others can do nothing without this group, or nobody has done anything yet, a heal may
    take as long as any transfer.

States
    *trying* (nothing is known, or all is well) → ``hopeless`` → *waiting*: measured again and again, soon at first, →
    *trying* again. Where it was measured well and was hopeless all the same, what was measured is not worth much:
    the next measurement is then ``_FIRST`` seconds away, twice as long each time. The same pause, and then a try, is
    all there is where nothing can be measured.

    *trying* → ``refused`` by all who have the state → tried again in the next steps, after a moment in each; when that
    has gone on, *waiting* beside the others' steps, longer each time → *trying* again. A try costs the others
    what their state functions take until one raises: so these pauses are at least ten times as long.
    Where they ask for another token it is *waiting* at once: no try makes that better, but a restart of theirs does.

    The time waited counts from when the group first waits until it is *up to date*, over all tries in between and for
    whichever of its ranks it waits.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from torchft.checkpointing import TooSlow, Unauthorized
from torchft.coordination import QuorumResult
from torchft.core.heal_allowance import SLOWEST, allowance, seconds_until_allowed
from torchft.runtime.logs import RankLogger
from torchft.runtime.loop import Timer, call_later
from torchft.runtime.retry import Backoff, doubled

__all__ = ["HealPause", "Pausing"]

_FIRST = 10.0
_LONGEST = 300.0
_SOON = 1.0
_SELDOM = 30.0
_END = 10.0
_MOMENTS = 0.05, 1.0
"""Seconds of the first and the longest pause within a step after a refusal: what made a source refuse is often over."""
_REFUSALS = 4
"""So many are answered by a moment; what lasts longer is waited for beside the others' steps."""
_MISFITS = 1
"""The same of states that do not fit: what a function raised may be over."""
_ASKED_AGAIN = 10.0
"""Seconds between two tries at last, where a refusal comes in less than a second."""
_COST = 10.0
"""Seconds of waiting for one that a try took."""
_TOKEN = 10.0, 60.0
"""Seconds of the first and the longest pause where all ask for another token."""
_TOO_SLOW = "the way to the sources is too slow for this state"
_ANOTHER = "another rank of this group takes no state now: its log says why"


class Pausing(RuntimeError):
    """No heal is tried in this step: it would hold the others up."""


class HealPause:
    """Of one rank. ``stop`` ends what measures.

    Args:
        measure: bytes a second that would come from those who have the state now. Raises where that cannot be said.
        timeout: seconds that a transfer may take.
        log: of the manager.
        bound: seconds that a heal may hold the others up, as somebody has set it; None: nobody has.
        min_replica_size: fewer groups than these commit no step.
        clock: seconds.
    """

    def __init__(
        self,
        measure: Callable[[], float],
        timeout: float,
        log: RankLogger,
        bound: float | None = None,
        min_replica_size: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._measure = measure
        self._timeout = timeout
        self._log = log
        self._bound = bound
        self._min_replica_size = min_replica_size
        self._clock = clock
        self._since: float | None = None
        self._exempt = False
        self._begun: tuple[int, float] | None = None  # the step in which this group waits, and when it began
        self._step = 0.0  # seconds, the shortest seen while this group waits
        self._length = 0.0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._waiting = threading.Event()
        self._refusals = self._tokens = 0  # since the last heal; for the token
        self._misfits = 0
        self._moments = Backoff(*_MOMENTS)
        self._timer: Timer | None = None
        self.why = _ANOTHER
        """Why this group waits, as far as this rank knows."""
        self.measured = False
        """The way to the sources is known to be good enough: it was measured, or a state has come by it."""

    @property
    def waits(self) -> bool:
        """No state is taken now."""
        return self._waiting.is_set()

    @property
    def waited(self) -> float:
        """Seconds since this group first waited for the state that it needs."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    @property
    def allowance(self) -> float:
        """Seconds that a heal may hold the others up now, over a sound way."""
        return self._allowed(math.inf)

    def _allowed(self, rate: float) -> float:
        """The same where so many bytes a second come."""
        return self._timeout if self._exempt else allowance(self.waited, self._timeout, self._bound, self._step, rate)

    def step(self, quorum: QuorumResult) -> None:
        """A step begins, with a heal if one is needed and not waited for."""
        if not (quorum.heal or quorum.waits):
            self.up_to_date()
            return
        if quorum.waits:
            self._sits_out()
            self._time_step(quorum.max_step)
        else:
            self._begun = None
        before = self._exempt
        self._exempt = quorum.max_step <= 0 or quorum.max_world_size < self._min_replica_size
        if self._exempt and not before:
            self._wake.set()

    def up_to_date(self) -> None:
        """This group needs no state."""
        self._since = self._begun = None
        self._step = 0.0

    def _sits_out(self) -> None:
        """This group waits, for this rank or for another one."""
        if self._since is None:
            self._since = self._clock()

    def _time_step(self, step: int) -> None:
        """One begins in which nobody is held up by this group."""
        now, known, allowed = self._clock(), self._step, self.allowance
        if self._begun is not None and step > self._begun[0]:
            took = (now - self._begun[1]) / (step - self._begun[0])
            self._step = min(took, known) if known else took
            if not known and took > allowed:
                self._wake.set()
        self._begun = step, now

    def check(self) -> None:
        """
        Raises:
            Pausing: no state is taken now.
        """
        if self.waits:
            raise Pausing(self.why)

    def hopeless(self, why: TooSlow) -> None:
        """A heal was given up. Not called while it waits."""
        pause = 0.0
        if self.measured or not why.nbytes:
            pause = self._length = min(_LONGEST, max(_FIRST, 2 * self._length))
        self.measured = False
        self.why = _TOO_SLOW
        self._sits_out()
        self._wake.clear()
        if self._stop.is_set():
            self._wake.set()
        self._waiting.set()
        self._thread = threading.Thread(
            target=self._watch, args=(why.nbytes, pause), name="torchft-measure", daemon=True
        )
        self._thread.start()

    def refused(self, why: Exception, took: float) -> float:
        """All who have the state live, and do not give it. Not called while it waits.

        Args:
            why: they said.
            took: seconds that the try took.

        Returns:
            Seconds to pause in this step; 0 where it waits beside the others' steps from now on.
        """
        if isinstance(why, Unauthorized):
            pause = self._for_the_token(why)
        else:
            self._refusals += 1
            if self._refusals <= _REFUSALS or self._exempt:
                return self.moment()
            pause = doubled(_SOON, self._refusals - _REFUSALS - 1, _ASKED_AGAIN)
            if self._refusals == _REFUSALS + 1:
                self._say_seldom("no group gives its state to this one", why, took)
        self._wait(f"no group gave its state when it was last asked: {why}", pause, took)
        return 0.0

    def misfits(self, why: Exception, took: float) -> None:
        """A state came that does not fit, or could not be loaded, or this group's own could not be read. The next tries
        mostly end alike, and cost a whole transfer each. Not called while it waits.

        Args:
            why: of this try.
            took: seconds that it took.
        """
        self._misfits += 1
        if self._misfits <= _MISFITS or self._exempt:
            return
        if self._misfits == _MISFITS + 1:
            self._say_seldom("this group cannot take the others' state", why, took)
        pause = doubled(_SOON, self._misfits - _MISFITS - 1, _ASKED_AGAIN)
        self._wait(f"it could not take the others' state when it last tried: {why}", pause, took)

    def fits(self) -> None:
        """A state that came is in place."""
        self._misfits = 0

    def _say_seldom(self, what: str, why: Exception, took: float) -> None:
        self._log.warning(
            "%s: %s. This group contributes nothing, holds nobody up, and asks again, at last every %.0f s",
            what,
            why,
            max(_ASKED_AGAIN, _COST * took),
        )

    def _wait(self, why: str, pause: float, took: float) -> None:
        """Beside the others' steps from now on."""
        self.why = why
        self._waiting.set()
        self._timer = call_later(max(pause, _COST * took), self._waiting.clear)

    def moment(self) -> float:
        """Seconds to pause in a step that a refusal makes fail: it comes at once, and may come in each step."""
        return self._moments.delay()

    def _for_the_token(self, why: Unauthorized) -> float:
        """A refusal. Seconds until the next try."""
        self._tokens += 1
        if self._tokens == 1:
            self._log.error(
                "the token of this group is not that of the groups that have the state, which refuse it: set "
                "TORCHFT_TOKEN to the same text in all groups. This group contributes nothing, holds nobody up, and "
                "asks again, at last every %.0f s. %s",
                _TOKEN[1],
                why,
            )
        return doubled(_TOKEN[0], self._tokens - 1, _TOKEN[1])

    def over(self) -> None:
        """A heal went well."""
        self.why = _ANOTHER
        self._length = 0.0
        self._refusals = self._tokens = 0
        self._moments = Backoff(*_MOMENTS)
        self.measured = True

    def stop(self) -> None:
        """Ends the thread that measures, soon."""
        self._stop.set()
        self._wake.set()
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """Waits until it has ended."""
        self.stop()
        if self._thread is not None:
            self._thread.join(_END)

    def _watch(self, nbytes: int, pause: float) -> None:
        """Until a try is worth it."""
        blind_until = self._clock() + (pause or _FIRST)
        told = False
        while not self._over(pause):
            try:
                rate = self._measure() if nbytes else 0.0
            except Exception as e:
                self._log.debug("the way to the sources cannot be measured: %s", e)
                rate = 0.0
            needed = nbytes / rate if rate > 0 else 0.0
            if rate > 0 and needed <= self._allowed(rate):
                self._log.info(
                    "the state comes at %.1f MB/s, in %.1f s, which is fast enough after %.0f s of waiting: healing",
                    rate / 1e6,
                    needed,
                    self.waited,
                )
                self.measured = True
                break
            if rate <= 0 and self._clock() >= blind_until:
                break
            pause = min(_SELDOM, max(_SOON, 2 * pause))
            if rate > 0:
                wait = seconds_until_allowed(needed, self.waited, self._timeout, self._bound, self._step, rate)
                if wait is not None:
                    pause = min(pause, max(_SOON, wait))
                if not told:
                    told = True
                    self._tell(nbytes, rate, wait)
        self._waiting.clear()

    def _over(self, pause: float) -> bool:
        """After a pause, or sooner if there is a reason to look at once: whether nobody wants to know any more."""
        self._wake.wait(pause)
        self._wake.clear()
        return self._stop.is_set()

    def _tell(self, nbytes: int, rate: float, wait: float | None) -> None:
        """What is wrong, when it will be over, and what can be done."""
        needed = nbytes / rate
        limit = f"and the other groups would stand that long, where {self._allowed(rate):.0f} s are allowed now"
        if wait is not None:
            then = (
                f"If it stays as it is, this group takes the state in about {wait:.0f} s: a heal may hold the others "
                "up for as long as a step, or a tenth of the time that was waited for it. heal_pause "
                "(TORCHFT_HEAL_PAUSE_SEC) sets another bound"
            )
        elif self._bound is not None and needed <= self._timeout:
            limit = (
                f"and a heal may hold the other groups up for {self._bound:g} s (heal_pause, TORCHFT_HEAL_PAUSE_SEC)"
            )
            then = "If it stays as it is, only a longer heal_pause lets this group heal"
        elif needed <= self._timeout:
            then = (
                f"Less than {SLOWEST / 1e6:g} MB/s is taken for a fault, for which nobody is made to stand: look at "
                "the network, and at the interface that the sources name (TORCHFT_HOST there chooses it). "
                f"TORCHFT_HEAL_PAUSE_SEC={math.ceil(1.2 * needed)} lets this group heal all the same, in one pause of "
                "all"
            )
        else:
            limit = f"and the other groups wait {self._timeout:.0f} s for a transfer (timeout)"
            then = "If it stays as it is, a longer timeout in all groups lets this one heal"
        self._log.warning(
            "the way to the groups that have the state is too slow: %.1f MB/s, so %.0f MB would take %.0f s, %s. This "
            "group contributes nothing meanwhile, and holds nobody up; the way is measured every %.0f s. %s",
            rate / 1e6,
            nbytes / 1e6,
            needed,
            limit,
            _SELDOM,
            then,
        )
