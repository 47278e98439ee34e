"""How processes are laid out: replicas x shards x tensor parallel. tp is innermost: its ranks are neighbours on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distllm.engines import processes
from distllm.types import Ranks, free

AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(kw_only=True, slots=True)
class MeshOptions:
    """Sizes of the axes; their product is the number of processes."""

    dp_replicate: int = free(1)
    """Whole copies of the model (HSDP). Larger sends less between machines and needs more memory."""
    dp_shard: int = free(0)
    """Processes that share the weights, gradients and moments of one copy; 0 takes all that the others leave."""
    tp_size: int = free(1)
    """Processes that split each matrix product. Keep them on one machine: they talk in every layer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the axes, resolved."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def dp_size(self) -> int:
        """Processes that see different data."""
        return self.dp_replicate * self.dp_shard


def shape_of(options: Any, world_size: int) -> Shape:
    """Resolve the layout of engine `options` (those without a `mesh` are data parallel alone); needs no processes."""
    mesh = getattr(options, "mesh", None) or MeshOptions()
    shard = mesh.dp_shard or max(1, world_size // (mesh.dp_replicate * mesh.tp_size))
    return Shape(mesh.dp_replicate, shard, mesh.tp_size)


def mesh_problems(options: Any, world_size: int) -> list[str]:
    """Check that the sizes multiply to the number of processes."""
    shape = shape_of(options, world_size)
    product = shape.dp_size * shape.tp
    if product == world_size:
        return []
    return [
        f"engine.mesh: dp_replicate ({shape.dp_replicate}) x dp_shard ({shape.dp_shard}) x tp_size ({shape.tp}) = "
        f"{product}, and there are {world_size} processes (WORLD_SIZE). Start {product} processes, or set "
        "sizes whose product is that number; engine.mesh.dp_shard=0 takes what the others leave."
    ]


def dp_size(options: Any) -> int:
    """Return how many processes see different data, from the launcher's variables."""
    return shape_of(options, processes.world_size()).dp_size


def ranks_of(options: Any) -> Ranks:
    """Say where this process stands, from the launcher's variables."""
    shape = shape_of(options, processes.world_size())
    rank = processes.rank()
    return Ranks(
        rank=rank,
        local_rank=processes.local_rank(),
        world_size=processes.world_size(),
        dp_rank=rank // shape.tp,
        dp_size=shape.dp_size,
        tp_rank=rank % shape.tp,
        tp_size=shape.tp,
    )


def build_mesh(options: Any, device_type: str) -> DeviceMesh:
    """Build the mesh of all processes. All ranks take part."""
    shape = shape_of(options, processes.world_size())
    return init_device_mesh(
        device_type, (shape.dp_replicate, shape.dp_shard, shape.tp), mesh_dim_names=AXES
    )
