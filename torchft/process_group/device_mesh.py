"""A device mesh with one dimension whose members come and go: the replica groups.

torch's DeviceMesh has a process group for each dimension and takes any that is registered. So the replica dimension is
given a :class:`ManagedProcessGroup`, and what uses the mesh (FSDP2's native HSDP, for instance) reduces over it like
over any other. The mesh itself is the group's own: its size along the replica dimension is 1, whatever takes part in
the step, since shards and placements must not depend on that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchft.process_group.managed import ManagedProcessGroup, ManagerLike

__all__ = ["ft_init_device_mesh"]


def ft_init_device_mesh(
    *,
    device_type: str,
    mesh_shape: Sequence[int],
    mesh_dim_names: Sequence[str],
    replicate_dim: int,
    manager: ManagerLike,
) -> DeviceMesh:
    """A mesh of the ranks of this group, with the replica groups as one more dimension.

    The managed group is registered under the dimension's name; a second mesh of the same manager in one process
    needs another name there.

    Args:
        device_type: ``"cpu"``, ``"cuda"`` and so on.
        mesh_shape: sizes of the dimensions; the replica dimension's is ignored. The others multiply to the world size
            of the default process group, which has the ranks of this group.
        mesh_dim_names: one for each dimension.
        replicate_dim: index of the replica dimension.
        manager: of this rank.

    Raises:
        ValueError: sizes, names and index do not fit together, or the name is registered already.
    """
    names = tuple(mesh_dim_names)
    if len(names) != len(mesh_shape) or not 0 <= replicate_dim < len(names):
        raise ValueError(f"mesh_shape {tuple(mesh_shape)}, mesh_dim_names {names} and {replicate_dim=} do not fit")
    inner_names = tuple(name for i, name in enumerate(names) if i != replicate_dim)
    inner_shape = tuple(size for i, size in enumerate(mesh_shape) if i != replicate_dim)
    if inner_names:
        inner = init_device_mesh(device_type, inner_shape, mesh_dim_names=inner_names)
        groups: list[dist.ProcessGroup] = [inner.get_group(name) for name in inner_names]
        ranks = inner.mesh
    else:
        groups, ranks = [], torch.tensor(dist.get_rank())
    managed = ManagedProcessGroup(manager)
    managed.register(names[replicate_dim])
    groups.insert(replicate_dim, managed)
    return DeviceMesh.from_group(groups, device_type, ranks.unsqueeze(replicate_dim), mesh_dim_names=names)
