"""Things that go wrong, on purpose: a fault injector for training jobs and for tests.

By hand, one fault at a time::

    kill(pid)                       # also stop, continue_; of a process itself: exit_, raise_, segfault, hold_gil
    with stop(pid, seconds=2): ...  # stands still; what lasts is an Effect and ends with its block at the latest
    with busy(10): ...              # all cores loaded
    with fill_disk("/mnt/small"): ...
    with limit_file_size(1 << 20): ...

    with Link("localhost:29510") as link:  # clients use link.address
        link.delay(0.1)                    # also cut, block, refuse, throttle
        link.restore()

By plan, in the training process, one line in the loop; the same seed gives the same schedule::

    injector = Injector("kill@step=7,once=/tmp/killed; hold_gil(20s)@every=60s,seed=4", name="replica_0")
    injector.attach(manager)        # or, without a Manager: injector.on_step(step) as each step begins

By plan, from outside::

    with Chaos("kill@every=30s,seed=4; stop(2s)@every=20s", lambda: {"a": a.pid, "b": b.pid}):
        ...

:meth:`Plan.parse` describes the text of a plan, :data:`KINDS` has all kinds. Every act is logged before it happens, by
the logger ``torchft.testing.faults``. Linux only: signals, ``/proc``, process handles.
"""

from torchft.testing.faults.chaos import Chaos
from torchft.testing.faults.disk import fill_disk, limit_file_size
from torchft.testing.faults.effect import Effect
from torchft.testing.faults.injector import Injector
from torchft.testing.faults.kinds import KINDS
from torchft.testing.faults.link import Link
from torchft.testing.faults.load import busy
from torchft.testing.faults.performing import Act
from torchft.testing.faults.plan import Fault, Plan, Schedule
from torchft.testing.faults.process import InjectedFault, continue_, exit_, hold_gil, kill, raise_, segfault, stop

__all__ = [
    "KINDS",
    "Act",
    "Chaos",
    "Effect",
    "Fault",
    "InjectedFault",
    "Injector",
    "Link",
    "Plan",
    "Schedule",
    "busy",
    "continue_",
    "exit_",
    "fill_disk",
    "hold_gil",
    "kill",
    "limit_file_size",
    "raise_",
    "segfault",
    "stop",
]
