"""Process groups whose members may change while training runs.

:class:`~torchft.process_group.base.ProcessGroup` says what they promise. Which one to use:

- :class:`ProcessGroupGloo` for CPU tensors, :class:`ProcessGroupNCCL` and :class:`ProcessGroupXCCL` for GPUs;
- :class:`ProcessGroupBabyGloo`, :class:`ProcessGroupBabyNCCL` and :class:`ProcessGroupBabyXCCL` where a collective that
  hangs must be ended whatever it does: it runs in a child process, which an abort kills;
- :class:`ManagedProcessGroup` where torch wants a group and a Manager is to do the work, and
  :func:`ft_init_device_mesh` where it wants a device mesh;
- not :class:`ProcessGroupTorchComms` yet: it says what is missing;
- :class:`ErrorSwallowingProcessGroupWrapper`, :class:`FakeProcessGroupWrapper` and :class:`ProcessGroupDummy`
  around or instead of one of these.
"""

from __future__ import annotations

from torchft.process_group.baby import ProcessGroupBabyGloo, ProcessGroupBabyNCCL, ProcessGroupBabyXCCL
from torchft.process_group.backend import BackendProcessGroup
from torchft.process_group.base import DEFAULT_TIMEOUT, ProcessGroup, ProcessGroupError, Reduction
from torchft.process_group.device_mesh import ft_init_device_mesh
from torchft.process_group.dummy import ProcessGroupDummy
from torchft.process_group.error_swallowing import ErrorSwallowingProcessGroupWrapper
from torchft.process_group.fake import FakeProcessGroupWrapper
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.process_group.managed import ManagedProcessGroup, ManagerLike
from torchft.process_group.nccl import ProcessGroupNCCL
from torchft.process_group.torchcomms import ProcessGroupTorchComms
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.process_group.xccl import ProcessGroupXCCL

__all__ = [
    "DEFAULT_TIMEOUT",
    "BackendProcessGroup",
    "ErrorSwallowingProcessGroupWrapper",
    "FakeProcessGroupWrapper",
    "ManagedProcessGroup",
    "ManagerLike",
    "ProcessGroup",
    "ProcessGroupBabyGloo",
    "ProcessGroupBabyNCCL",
    "ProcessGroupBabyXCCL",
    "ProcessGroupDummy",
    "ProcessGroupError",
    "ProcessGroupGloo",
    "ProcessGroupNCCL",
    "ProcessGroupTorchComms",
    "ProcessGroupWrapper",
    "ProcessGroupXCCL",
    "Reduction",
    "ft_init_device_mesh",
]
