"""A TorchX component: replica groups under torchrun, and their lighthouse.

    torchx run -s local_cwd torchft/launch/torchx_component.py:replica_groups --script train_ddp.py --groups 2

Each group is a role of its own, so a scheduler that restarts a role restarts one group, which then heals from the
others. TorchX executes this file by its path (so it imports nothing of torchft and has no ``from __future__``). The
examples' folders have a ``.torchxconfig`` that names it: there ``torchx run`` alone is enough.
"""

import sys
from typing import Dict, Optional  # noqa: UP035 - TorchX reads the signature and knows these names only

import torchx.specs as specs

__all__ = ["replica_groups"]


def replica_groups(
    *script_args: str,
    script: str,
    groups: int = 2,
    nproc_per_node: int = 1,
    lighthouse: str = "",
    lighthouse_port: int = 29510,
    min_replicas: int = 1,
    join_timeout_ms: int = 1000,
    max_restarts: int = 3,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    image: str = "",
) -> specs.AppDef:
    """Replica groups that train one model, each under a torchrun of its own.

    Args:
        script_args: arguments of the script
        script: what each rank runs
        groups: number of replica groups
        nproc_per_node: ranks of a group, all on one host
        lighthouse: address of one that runs already; by default one is started beside the groups, on their host
        lighthouse_port: of the lighthouse that is started; it ends when the groups have
        min_replicas: how many groups it waits for before any of them trains
        join_timeout_ms: how long it waits for groups that have not asked yet
        max_restarts: how often torchrun restarts a group that failed
        env: variables for all groups, A=1,B=2
        image: for schedulers that run images
    """
    roles = []
    if not lighthouse:
        lighthouse = f"http://localhost:{lighthouse_port}"
        arguments = [
            f"--min_replicas={min_replicas}",
            f"--bind=[::]:{lighthouse_port}",
            f"--join_timeout_ms={join_timeout_ms}",
        ]
        roles.append(
            specs.Role(
                name="lighthouse",
                image=image,
                entrypoint=sys.executable,
                args=["-m", "torchft.cli.lighthouse", *arguments, "--end_when_idle_sec=5"],
            )
        )
    for group in range(groups):
        roles.append(
            specs.Role(
                name=f"group{group}",
                image=image,
                entrypoint=sys.executable,
                args=[
                    "-m",
                    "torch.distributed.run",
                    "--rdzv_backend=c10d",
                    "--rdzv_endpoint=localhost:0",
                    "--nnodes=1",
                    f"--nproc_per_node={nproc_per_node}",
                    f"--max_restarts={max_restarts}",
                    "--",
                    script,
                    *script_args,
                ],
                env={
                    **(env or {}),
                    "REPLICA_GROUP_ID": str(group),
                    "NUM_REPLICA_GROUPS": str(groups),
                    "TORCHFT_LIGHTHOUSE": lighthouse,
                },
            )
        )
    return specs.AppDef(name="torchft", roles=roles)
