"""From a config to what a training step of it needs and takes: the formulas of this folder put together for one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from distllm.config.activations import MicroBatch
from distllm.config.checks import model_options
from distllm.config.layout import Layout, layout_of
from distllm.config.memory import RankMemory, rank_memory
from distllm.config.schema import Config
from distllm.config.shapes import ModelShape, has_formula, shape_of_model
from distllm.config.step_time import StepTime, step_time
from distllm.engines.cluster import ClusterOptions
from distllm.engines.hardware import resolve_device, resolve_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The machine that a run is planned for."""

    cluster: ClusterOptions | None
    """None: this machine."""
    world_size: int
    on_cpu: bool
    dtype: torch.dtype
    """Of the heavy arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one process of a run needs and how long a step takes."""

    shape: ModelShape
    work: MicroBatch
    layout: Layout
    accum: int
    """Micro-batches per step."""
    memory: RankMemory
    time: StepTime | None
    """None on a machine whose rates are not known."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all processes."""
        return self.work.tokens * self.accum * self.layout.dp


def target_of(config: Config) -> Target:
    """Work out the machine that `config` is for: the one `hardware` describes, else this one.

    Raises:
        UserError: this machine cannot compute as asked.
    """
    hardware = config.hardware
    if isinstance(hardware, ClusterOptions):
        world_size = 1 if config.engine.name == "single" else hardware.num_gpus
        dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        return Target(cluster=hardware, world_size=world_size, on_cpu=False, dtype=dtype)
    device = resolve_device(hardware.device)
    return Target(
        cluster=None,
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        on_cpu=device.type == "cpu",
        dtype=resolve_precision(config.train.precision, device),
    )


def micro_batch(config: Config, target: Target, seq_len: int, tp: int) -> MicroBatch:
    """Describe what one process computes at a time."""
    pairs = 2 if config.stage.name == "reward" else 1
    return MicroBatch(
        batch=config.train.micro_batch_size * pairs,
        seq=seq_len,
        element=target.dtype.itemsize,
        packed=config.stage.name == "pretrain",
        on_cpu=target.on_cpu,
        checkpointing=config.engine.activation_checkpointing,
        compiled=config.engine.compile,
        casts_weights=config.engine.name in ("single", "ddp", "accelerate"),
        tp=tp,
    )


def forecast(config: Config, head: str = "lm", shape: ModelShape | None = None) -> Forecast:
    """Predict memory and time of a step of the model that `config` trains.

    Args:
        config: the run.
        head: of the model.
        shape: of the model, where it is known already.

    Raises:
        UserError: this machine cannot compute as asked.
    """
    target = target_of(config)
    options = model_options(config)
    shape = shape or shape_of_model(options, head)
    layout = layout_of(config.engine, target.world_size)
    work = micro_batch(config, target, min(config.train.seq_len, options.max_seq_len), layout.tp)
    accum = max(1, config.train.global_batch_size // (config.train.micro_batch_size * layout.dp))
    time = None
    if target.cluster is not None:
        time = step_time(shape, work, layout, accum, target.cluster)
    return Forecast(
        shape=shape,
        work=work,
        layout=layout,
        accum=accum,
        memory=rank_memory(shape, work, layout, accum),
        time=time,
    )


__all__ = ["Any", "Forecast", "Target", "forecast", "has_formula", "target_of"]
