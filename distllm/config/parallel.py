"""Which layouts of processes a model can take, and what cannot be combined: refused before anything starts."""

from __future__ import annotations

from typing import Any

from distllm.config.schema import Config
from distllm.engines.mesh import mesh_problems, shape_of


def parallel_problems(config: Config, options: Any, world_size: int) -> list[str]:
    """Check the layout of `config.engine` against the number of processes and the model's shape.

    Args:
        config: everything that is set.
        options: shape of the model: `config.arch`, or that of `config.model`.
        world_size: processes that the launcher started.
    """
    problems = mesh_problems(config.engine, world_size)
    tp_size = shape_of(config.engine, world_size).tp
    if tp_size > 1:
        problems += _tensor_parallel_problems(config, options, tp_size)
    return problems


def _tensor_parallel_problems(config: Config, options: Any, tp_size: int) -> list[str]:
    problems = []
    asked = f"engine.mesh.tp_size={tp_size}"
    for name in ("n_heads", "n_kv_heads", "d_ff"):
        value = getattr(options, name, tp_size)
        if value % tp_size:
            fitting = [n for n in range(1, value + 1) if value % n == 0 and n <= tp_size]
            problems.append(
                f"{asked} does not divide arch.{name}={value}, and each process takes an equal part. "
                f"Set engine.mesh.tp_size={fitting[-1]}."
            )
    if getattr(options, "num_experts", 0):
        problems.append(
            f"{asked} cannot be combined with experts (arch.num_experts={options.num_experts}): their balance is "
            "judged per sequence, and each process would see a part of it. Set engine.mesh.tp_size=1."
        )
    if getattr(options, "qk_norm", "none") == "full":
        problems.append(
            f"{asked} cannot be combined with arch.qk_norm=full, which normalises over all heads at once. "
            "Set engine.mesh.tp_size=1."
        )
    if config.engine.compile and config.engine.activation_checkpointing == "selective":
        problems.append(
            f"{asked} cannot be combined with engine.compile=true and engine.activation_checkpointing=selective: the "
            "exchanges inside a block would leave nothing compiled. Set engine.activation_checkpointing=full or none, or "
            "engine.compile=false."
        )
    return problems
