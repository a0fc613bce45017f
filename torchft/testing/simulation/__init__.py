"""The control protocol under a simulated network and clock: thousands of schedules of faults in a minute.

The real machines of :mod:`torchft.core` (lighthouse, members, election, assignment, votes) drive everything; only the
shells around them, which carry messages, are simulated. A run is a function of its schedule: what fails once fails
again, with a trace, and can be made small (docs/simulation.md).

From the command line::

    torchft simulate --seeds 100000 --jobs 2        # random schedules
    torchft simulate --replay FILE                  # one, with its trace

A scenario of one's own is a text, or a :class:`Schedule`::

    result = run(Schedule.parse('''
        seed 1
        settings replicas=3 lease=4
        at 2 cut g0 L0 for 6          # g0 loses the lighthouse
        at 3 crash L0 for 0.5         # which is killed, and started again half a second later
        on commit 20 +0 kill ~        # whoever commits the 20th time is killed
    '''), trace=True)
    assert result.violation is None, result.trace.text()
    assert result.seen["takeover"] == 0

:mod:`torchft.testing.simulation.faults` has all kinds of faults, :class:`Settings` all sizes and times,
:mod:`torchft.testing.simulation.invariants` what is checked. :class:`Parts` puts changed code in the place of the
core's, to see what a rule is worth::

    class Hasty(StandingLighthouse):
        ...                           # forgets to wait for the lease

    failed = run_seeds(range(300), parts=Parts(lighthouse=Hasty)).failed
    print(minimal(failed[0], Parts(lighthouse=Hasty)).trace.text())
"""

from torchft.testing.simulation.faults import Fault, Schedule, When
from torchft.testing.simulation.generate import STORIES, generate
from torchft.testing.simulation.invariants import Violation
from torchft.testing.simulation.job import Job, Parts
from torchft.testing.simulation.run import Result, Summary, minimal, run, run_seed, run_seeds
from torchft.testing.simulation.settings import Settings
from torchft.testing.simulation.shrink import shrink
from torchft.testing.simulation.trace import Trace

__all__ = [
    "STORIES",
    "Fault",
    "Job",
    "Parts",
    "Result",
    "Schedule",
    "Settings",
    "Summary",
    "Trace",
    "Violation",
    "When",
    "generate",
    "minimal",
    "run",
    "run_seed",
    "run_seeds",
    "shrink",
]
