"""Process groups whose collectives run in a child process, which an abort kills.

The idea
    A collective that hangs inside a library cannot be ended from outside, and what a device does for it even less; a
    process can always be killed. So the group that does the work lives in a child, and the trainer has a stand-in that
    gives it tensors in shared memory and is told how each collective ended. Killing the child closes its connections,
    which the other members see at once.

Parts
    ``group``    the classes; ``carrier``  our end of one child; ``child``  the child itself
    ``calls``    a collective as a message; ``memory``, ``gpu``  what both processes have; ``work``  what callers get

A configuration of a healthy child is made in the same child. One that was killed is replaced in milliseconds, since
children are forked off a process that has imported torch already (:mod:`torchft.runtime.nursery`).
"""

from __future__ import annotations

from torchft.process_group.baby.group import ProcessGroupBabyGloo, ProcessGroupBabyNCCL, ProcessGroupBabyXCCL

__all__ = ["ProcessGroupBabyGloo", "ProcessGroupBabyNCCL", "ProcessGroupBabyXCCL"]
