"""How an engine spreads a model over processes, in numbers: what is split, over how many, and what talks to what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from distllm import registry
from distllm.config.shapes import ModelShape, Size
from distllm.engines.base import resolve
from distllm.engines.mesh import shape_of

SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}
"""What is split over the sharding processes -> the ZeRO stage from which on it is.

Reference: Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, figure 1.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the mesh and the stage of sharding. FSDP is stage 3, DDP and one process are stage 0."""

    engine: str = "single"
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    """Pipeline stages. No engine here has them; published runs do."""
    pp_chunks: int = 1
    """Pieces of the model per pipeline stage (interleaved schedule)."""
    zero_stage: int = 0
    reshard: bool = True
    """Stage 3: give gathered weights back after a block's forward and gather them again in the backward."""
    reduces_once: bool = True
    """Gradients are brought together once per step, not after each micro-batch."""
    offload_optimizer: bool = False
    """Moments live in the host's memory."""
    offload_weights: bool = False
    """Sharded weights and gradients do, too."""
    bucket_mib: int = 200
    """DeepSpeed: size of the buckets that gradients travel in."""
    overlaps_tp: bool = False
    """Products are cut into pieces whose transfers hide behind each other (asynchronous tensor parallel)."""

    @property
    def dp(self) -> int:
        """Processes that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.dp * self.tp * self.pp

    @property
    def lowers_weights(self) -> bool:
        """Whether the weights are held in the dtype of the arithmetic, with fp32 originals beside them (ZeRO)."""
        return self.engine == "deepspeed" and self.zero_stage > 0

    def shards(self, what: str) -> int:
        """Return over how many data-parallel processes `what` (weights, gradients, optimizer) is split."""
        return self.dp_shard if self.zero_stage >= SHARDED_FROM[what] else 1


def layout_of(options: Any, world_size: int) -> Layout:
    """Read the layout of engine `options` on `world_size` processes."""
    engine, options = resolve(options)
    # Accelerate's own wrapper is torch's DistributedDataParallel too.
    name = "ddp" if issubclass(engine, registry.get("engine", "ddp")) else options.name
    if name == "single":
        return Layout()
    sizes = shape_of(options, world_size)
    tp, replicate, shard = sizes.tp, sizes.dp_replicate, sizes.dp_shard
    stage = {"fsdp": 3}.get(name, getattr(options, "zero_stage", 0))
    if stage == 0:
        replicate, shard = replicate * shard, 1
    offloads = getattr(options, "cpu_offload", False)
    return Layout(
        engine=name,
        dp_replicate=replicate,
        dp_shard=shard,
        tp=tp,
        zero_stage=stage,
        reshard=getattr(options, "reshard_after_forward", True),
        reduces_once=stage < 2 or getattr(options, "no_sync", False),
        offload_optimizer=offloads or getattr(options, "offload_optimizer", False),
        bucket_mib=(name == "deepspeed" and options.bucket_mib) or 200,
        offload_weights=offloads or getattr(options, "offload_param", False),
    )


def local_numel(sizes: tuple[Size, ...], layout: Layout, shards: int) -> int:
    """Count the numbers of `sizes` on the fullest process: matrices cut by tp, then dim 0 of each over `shards`."""
    return sum(_local(size, layout.tp, shards) for size in sizes)


def _local(size: Size, tp: int, shards: int) -> int:
    if len(size) < 2:
        return -(-math.prod(size) // shards)  # gains stay whole under tensor parallel
    numel = math.prod(size)
    rows = -(-size[0] // shards)
    return -(-rows * (numel // size[0]) // tp)


def stage_layers(shape: ModelShape, layout: Layout) -> int:
    """Return the blocks of the fullest pipeline stage."""
    return -(-shape.n_layers // layout.pp)
