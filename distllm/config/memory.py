"""Bytes that one process needs for a training step: weights, gradients, moments, activations, logits, buffers.

Closed formulas over `shapes.py` (the model), `activations.py` (one micro-batch) and `layout.py` (what is split).
`tests/config/test_memory.py` holds them against the storages of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distllm.config.activations import MicroBatch, Moment
from distllm.config.activations import moments as formulas
from distllm.config.layout import Layout, local_numel, stage_layers
from distllm.config.shapes import ModelShape

_FP32 = 4
MOMENTS = 2
"""AdamW's running means, fp32 each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on the fullest process, each class at its own worst moment."""

    weights: int
    """Master weights, and the copies that an engine keeps beside them."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    """What the loss takes: a chunk of logits and the gradients of hidden states and output matrix."""
    held: int = 0
    """Activations and logits together at their worst."""
    communication: int = 0
    """Gathered weights and gradients on their way."""
    peak: int = 0
    """Most bytes at one moment: less than the sum, because not all of it exists at once."""
    worst: str = ""
    """The moment of the peak."""
    host: int = 0
    """Bytes in the host's memory instead (offload)."""


def rank_memory(
    shape: ModelShape,
    work: MicroBatch,
    layout: Layout,
    accum: int = 1,
    *,
    moments: list[Moment] | None = None,
    trained: bool = True,
) -> RankMemory:
    """Count the bytes of one process for one model.

    Args:
        shape: of the model.
        work: one micro-batch.
        layout: of the engine.
        accum: micro-batches per step; from the second on all gradients exist already in the forward.
        moments: worst moments of an architecture without formulas.
        trained: whether it has gradients and moments; a frozen model holds nothing between two calls.
    """
    layers = stage_layers(shape, layout)
    weights = _FP32 * _local(shape, layout, "weights")
    gradients = _FP32 * _local(shape, layout, "gradients")
    optimizer = MOMENTS * _FP32 * _local(shape, layout, "optimizer")
    communication = _communication(shape, work, layout)
    if not trained:
        host = weights if layout.offload_weights else 0
        return RankMemory(weights=weights - host, host=host, communication=communication,
                          peak=weights - host + communication, worst="forward")  # fmt: skip
    found = moments or formulas(replace(shape, n_layers=layers * in_flight(layout, accum)), work)
    host = 0
    if layout.offload_optimizer:
        host, optimizer = optimizer, 0
    if layout.offload_weights:
        host, weights, gradients = host + weights + gradients, 0, 0

    def total(moment: Moment) -> float:
        share = 1.0 if accum > 1 else moment.gradients
        return moment.total + share * gradients

    worst = max(found, key=total)
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(m.activations for m in found),
        logits=max(m.logits for m in found),
        held=max(m.total for m in found),
        communication=communication,
        peak=round(weights + optimizer + communication + total(worst)),
        worst=worst.name,
        host=host,
    )


def in_flight(layout: Layout, accum: int) -> int:
    """Return how many micro-batches the first pipeline stage holds at once (one forward, one backward in turn)."""
    return min(layout.pp, accum)


def _local(shape: ModelShape, layout: Layout, what: str) -> int:
    shards = layout.shards(what)
    blocks = stage_layers(shape, layout) * local_numel(shape.block, layout, shards)
    return blocks + local_numel(shape.rest, layout, shards)


def _communication(shape: ModelShape, work: MicroBatch, layout: Layout) -> int:
    if layout.zero_stage < 3 or layout.dp_shard == 1:
        return 0
    whole = replace(layout, dp_shard=1)
    block, rest = local_numel(shape.block, whole, 1), local_numel(shape.rest, whole, 1)
    # The block at work and the next one; the root's weights from forward to backward; one block's gradient, as it
    # comes and as it is summed.
    return work.element * (2 * block + rest + block) + _FP32 * block
