"""Bytes that one process needs for a training step: weights, gradients, moments, activations, logits, buffers.

Closed formulas over `shapes.py` (the model), `activations.py` (one micro-batch) and `layout.py` (what is split).
`tests/config/test_memory.py` holds them against the storages of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distllm.arch.quantised import BYTES_PER_WEIGHT
from distllm.config.activations import MicroBatch, Moment
from distllm.config.activations import moments as formulas
from distllm.config.layout import Layout, local_numel, stage_layers
from distllm.config.shapes import ModelShape
from distllm.config.zero import ZeroMemory

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
    working: int = 0
    """Activations, logits, communication and gradients not yet cut up, together at their worst."""
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
    if layout.lowers_weights:
        return _zero_memory(shape, work, layout, accum, moments, trained)
    weights, gradients, optimizer = (
        _FP32 * _local(shape, layout, what) for what in ("weights", "gradients", "optimizer")
    )
    optimizer *= MOMENTS
    saved = stage_layers(shape, layout) * shape.held_in_4bit
    weights -= int((_FP32 - BYTES_PER_WEIGHT) * saved)
    buffers = Buffers(shape, work, layout, accum)
    if not trained:
        gathered = buffers.forward
        host = weights if layout.offload_weights else 0
        return RankMemory(weights=weights - host, host=host, communication=gathered,
                          peak=weights - host + gathered, worst="forward")  # fmt: skip
    layers = stage_layers(shape, layout) * in_flight(layout, accum)
    found = moments or formulas(replace(shape, n_layers=layers), work)
    host = optimizer if layout.offload_optimizer else 0
    if layout.offload_weights:
        host += weights + gradients
        weights = gradients = 0
    if layout.offload_optimizer:
        optimizer = 0

    def beside(moment: Moment) -> int:
        return buffers.gradients_at(moment, gradients) + buffers.at(moment)

    worst = max(found, key=lambda m: m.total + beside(m))
    return RankMemory(
        weights=weights,
        gradients=gradients * buffers.copies_of_gradients,
        optimizer=optimizer,
        activations=max(m.activations for m in found),
        logits=max(m.logits for m in found),
        working=max(m.total + buffers.at(m) for m in found),
        communication=max(buffers.at(m) for m in found),
        peak=weights + optimizer + worst.total + beside(worst),
        worst=worst.name,
        host=host,
    )


def _zero_memory(
    shape: ModelShape,
    work: MicroBatch,
    layout: Layout,
    accum: int,
    moments: list[Moment] | None,
    trained: bool,
) -> RankMemory:
    """Count the same under DeepSpeed from stage 1 on."""
    zero = ZeroMemory(shape, work.element, layout, accum)
    lowered, host = zero.lowered, 0
    if layout.offload_weights:
        lowered, host = 0, lowered
    if not trained:
        return RankMemory(weights=lowered, host=host, communication=zero.gathered,
                          peak=lowered + zero.gathered, worst="forward")  # fmt: skip
    found = moments or formulas(shape, work)
    weights, optimizer = lowered + zero.master, MOMENTS * zero.master
    if layout.offload_optimizer:
        host += zero.master + optimizer + zero.host
        weights, optimizer = lowered, 0
    beside = {m.name: m.total + zero.at(m) + zero.gradients_at(m) for m in found}
    beside["sum of gradients"] = zero.after_backward + zero.buffers_after_backward
    beside["update"] = zero.at_update + zero.buffers_at_update
    worst = max(beside, key=lambda name: beside[name])
    return RankMemory(
        weights=weights,
        gradients=max(zero.at_update, zero.after_backward),
        optimizer=optimizer,
        activations=max(m.activations for m in found),
        logits=max(m.logits for m in found),
        working=max(*(m.total + zero.at(m) for m in found), zero.buffers_after_backward),
        communication=max(*map(zero.at, found), zero.buffers_after_backward),
        peak=weights + optimizer + beside[worst],
        worst=worst,
        host=host,
    )


def in_flight(layout: Layout, accum: int) -> int:
    """Return how many micro-batches the first pipeline stage holds at once (one forward, one backward in turn)."""
    return min(layout.pp, accum)


def _local(shape: ModelShape, layout: Layout, what: str) -> int:
    shards = layout.shards(what)
    block, rest = shape.trained_block, shape.trained_rest
    if what == "weights":
        block, rest = shape.block, shape.rest
    return stage_layers(shape, layout) * local_numel(block, layout, shards) + local_numel(
        rest, layout, shards
    )


class Buffers:
    """What an engine holds beside the tensors of the model: gathered weights, gradients on their way."""

    def __init__(self, shape: ModelShape, work: MicroBatch, layout: Layout, accum: int) -> None:
        self.layout, self.accum, self.element = layout, accum, work.element
        self.layers = stage_layers(shape, layout)
        whole = replace(layout, dp_shard=1)
        self.block = local_numel(shape.block, whole, 1)
        self.rest = local_numel(shape.rest, whole, 1)
        self.trained_block = local_numel(shape.trained_block, whole, 1)
        self.trained_rest = local_numel(shape.trained_rest, whole, 1)
        self.shards = layout.dp_shard if layout.zero_stage == 3 else 1

    @property
    def copies_of_gradients(self) -> int:
        """DDP's buckets are gradients; micro-batches before the last one collect theirs beside them."""
        return 2 if self.layout.engine == "ddp" and self.accum > 1 else 1

    @property
    def forward(self) -> int:
        """The root's weights in fp32 from forward to backward, one block's, and what arrives for the next."""
        if self.layout.zero_stage < 3:
            return 0
        return _FP32 * self.rest + 2 * self.element * self.block

    def at(self, moment: Moment) -> int:
        """Return the bytes of gathered weights and of gradients that are not summed and cut up yet."""
        layout, e = self.layout, self.element
        if layout.zero_stage < 3:
            return 0
        root = _FP32 * self.rest
        blocks = min(
            moment.blocks, self.layers
        )  # a pipeline holds several micro-batches of each block
        # The next block's weights; behind the first block of the model there is none, and alone nobody sends.
        is_last = moment.in_backward and moment.blocks <= 1
        arriving = 0 if is_last or layout.dp_shard == 1 else e * self.block
        if layout.reshard:
            kept = e * self.block if moment.in_backward and moment.blocks else 0
        else:
            kept = e * self.block * blocks
        # The gradient of the block before is summed in fp32 behind the block at work; the root's, behind the next
        # micro-batch's forward.
        leaving = 0
        if moment.in_backward and moment.blocks < self.layers:
            leaving = _FP32 * self.trained_block
        elif self.accum > 1:
            leaving = _FP32 * self.trained_rest
        if self.accum > 1 and layout.reduces_once:  # earlier micro-batches left whole gradients
            leaving += _FP32 * blocks * self.trained_block
        whole = 0
        if moment.in_backward:  # gradients of the block at work and of the root are not cut up yet
            whole = (e * moment.part + _FP32 * moment.rest) // layout.tp
        return root + kept + arriving + leaving + whole

    def gradients_at(self, moment: Moment, gradients: int) -> int:
        """Return the bytes of finished gradients; `gradients` are those of all weights on this process."""
        if self.layout.engine == "ddp":
            return gradients * self.copies_of_gradients
        whole, tp = self.layout.zero_stage < 3, self.layout.tp
        if not moment.in_backward:
            done = 0
        else:
            finished = (self.layers - moment.blocks) * self.trained_block
            done = _FP32 * finished // self.shards
            if whole:
                done += _FP32 * (moment.part + moment.rest) // tp
        collected = self.accum > 1 and (whole or not self.layout.reduces_once)
        return gradients if collected else done
