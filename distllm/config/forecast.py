"""From a config to what a training step of it needs and takes: the formulas of this folder put together for one run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from distllm.config.abilities import packs_dialogues
from distllm.config.activations import MicroBatch, Moment, loss_bytes
from distllm.config.checks import model_options
from distllm.config.flops import ModelFlops, model_flops
from distllm.config.footprint import build_meta, cache_bytes, saved_bytes
from distllm.config.layout import Layout, layout_of
from distllm.config.memory import RankMemory, rank_memory
from distllm.config.roles import Role, roles_of
from distllm.config.schema import Config, supervised_stages
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
class Models:
    """Everything about a stage's models that does not depend on where they run."""

    roles: list[Role]
    shapes: dict[str, ModelShape]
    """By role."""
    flops: ModelFlops
    """Of the first role."""
    traces: dict[tuple[int, int], int] = field(default_factory=dict)
    """(sequences, tokens) -> bytes that a traced forward held, for architectures without formulas."""

    @property
    def main(self) -> ModelShape:
        """Shape of the model that the stage is about."""
        return self.shapes[self.roles[0].name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one process of a run needs and how long a step takes."""

    target: Target
    work: MicroBatch
    layout: Layout
    accum: int
    """Micro-batches per step."""
    memory: dict[str, RankMemory]
    """By role."""
    cache_bytes: int
    """Keys and values while sampling."""
    time: StepTime | None
    """Of the first role; None on a machine whose rates are not known."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all processes."""
        return self.work.tokens * self.accum * self.layout.dp

    @property
    def peak(self) -> int:
        """Most bytes of one process: the worst moment of one trained model beside what the others hold all the time."""
        resident = [m.weights + m.optimizer for m in self.memory.values()]
        beyond = [m.peak - m.weights - m.optimizer for m in self.memory.values()]
        return sum(resident) + max(*beyond, self.cache_bytes)

    @property
    def available(self) -> int | None:
        """Bytes that tensors may take on one process of the planned cluster; None for this machine."""
        if self.target.cluster is None:
            return None
        return int((self.target.cluster.memory_gib - self.target.cluster.reserve_gib) * 2**30)

    @property
    def fits(self) -> bool:
        """Whether the peak stays below what a GPU of the cluster has for tensors."""
        return self.available is None or self.peak <= self.available


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


def models_of(config: Config) -> Models:
    """Read the shapes of the stage's models."""
    options, roles = model_options(config), roles_of(config)
    adapter = None if config.adapter.name == "none" else config.adapter
    shapes = {
        role.name: shape_of_model(options, role.head, adapter if role.is_trained else None)
        for role in roles
    }
    flops = model_flops(build_meta(options, roles[0].head), adapter)
    return Models(roles=roles, shapes=shapes, flops=flops)


def forecast(config: Config, models: Models) -> Forecast:
    """Predict memory and time of a step.

    Raises:
        UserError: this machine cannot compute as asked.
    """
    target, options = target_of(config), model_options(config)
    layout = layout_of(config.engine, target.world_size)
    train, stage = config.train, config.stage
    seq = min(train.seq_len, options.max_seq_len)
    work = MicroBatch(
        batch=train.micro_batch_size * (2 if supervised_stages().get(stage.name) == "pairs" else 1),
        seq=seq,
        element=target.dtype.itemsize,
        packed=stage.name == "pretrain" or (stage.name == "sft" and packs_dialogues(config)),
        on_cpu=target.on_cpu,
        checkpointing=config.engine.activation_checkpointing,
        compiled=config.engine.compile,
        casts_blocks=layout.engine != "fsdp" and not layout.lowers_weights,
        casts_head=not layout.lowers_weights,
        stream=target.dtype.itemsize if layout.lowers_weights else 4,
        tp=layout.tp,
    )
    accum = max(1, train.global_batch_size // (train.micro_batch_size * layout.dp))
    traced = None
    if not has_formula(options):
        traced = _traced(config, models, work, target.dtype)
    memory = {
        role.name: rank_memory(
            models.shapes[role.name], work, layout, accum, moments=traced, trained=role.is_trained
        )
        for role in models.roles
    }
    cache = 0
    if hasattr(stage, "rollout_batch_size"):
        rows = -(-(stage.rollout_batch_size or train.global_batch_size) // layout.dp)
        length = min(options.max_seq_len, seq + config.generation.max_new_tokens)
        cache = cache_bytes(build_meta(options), rows, length, target.dtype)
    time = None
    if target.cluster is not None:
        time = step_time(models.main, work, layout, accum, target.cluster)
    return Forecast(
        target=target,
        work=work,
        layout=layout,
        accum=accum,
        memory=memory,
        cache_bytes=cache,
        time=time,
    )


def _traced(config: Config, models: Models, work: MicroBatch, dtype: torch.dtype) -> list[Moment]:
    """Estimate the worst moment of an architecture without formulas, from a forward traced without memory."""
    key, shape = (work.batch, work.seq), models.main
    if key not in models.traces:
        options = model_options(config)
        models.traces[key] = saved_bytes(options, *key, dtype, packed=work.packed)
    held = models.traces[key]
    if work.checkpointing != "none":
        inputs = shape.n_layers * 4 * work.tokens * shape.d_model
        held = min(held, held // shape.n_layers + inputs)
    return [
        Moment(
            name="loss, forward",
            activations=held // work.tp,
            logits=loss_bytes(shape, work)[0],
            blocks=shape.n_layers,
            in_backward=False,
        )
    ]
