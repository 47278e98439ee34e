"""Predicts the time of an optimizer step on a cluster: arithmetic, memory traffic, communication that nothing hides.

Four costs per block: matrix products, attention, what moves through the GPU's memory, transfers. How close real runs
come to the datasheet is in `Efficiency`: five numbers, fitted to five published runs by `benchmarks/plan_published.py`,
which reports the error on the runs it did not see.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config.activations import MicroBatch, block_held
from distllm.config.communication import Transfer, transfers
from distllm.config.layout import Layout, local_numel, stage_layers
from distllm.config.shapes import ModelShape
from distllm.engines.cluster import ClusterOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How close to the datasheet a step comes."""

    matmul: float = 0.703
    """Share of the bf16 (or fp32) peak in the products of linear layers."""
    fp8: float = 0.647
    """Share of the fp8 peak in the products of linear layers."""
    attention: float = 0.206
    """Share of the bf16 peak in fused attention, counting visible pairs only."""
    traffic: float = 16.32
    """Bytes moved through memory per byte that a block holds for its backward, forward and backward together, over the
    share of the bandwidth that is reached."""
    links: float = 0.647
    """Share of the links' rate that collectives reach."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One kind of transfer and its time per step."""

    transfer: Transfer
    seconds: float
    exposed_s: float
    """What nothing hides: all of it where arithmetic waits, else its share of what exceeds the arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on one GPU."""

    matmul_s: float
    attention_s: float
    traffic_s: float
    """Elementwise work, norms and the loss, which wait for memory."""
    optimizer_s: float
    bubble_s: float
    """Waiting of a pipeline that fills and drains."""
    sent: tuple[Sent, ...]

    @property
    def communication_s(self) -> float:
        """Of all transfers, hidden or not."""
        return sum(s.seconds for s in self.sent)

    @property
    def exposed_s(self) -> float:
        """The part of it that nothing hides."""
        return sum(s.exposed_s for s in self.sent)

    @property
    def step_s(self) -> float:
        """The whole step."""
        compute = self.matmul_s + self.attention_s + self.traffic_s + self.optimizer_s
        return compute + self.exposed_s + self.bubble_s


def step_time(
    shape: ModelShape,
    work: MicroBatch,
    layout: Layout,
    accum: int,
    cluster: ClusterOptions,
    *,
    fp8: bool = False,
    recomputed_matmuls: float = 0.0,
    efficiency: Efficiency | None = None,
) -> StepTime:
    """Predict one step of `accum` micro-batches.

    Args:
        shape: of the model.
        work: one micro-batch of one data-parallel rank.
        layout: of the engine.
        accum: micro-batches per step.
        cluster: the machines.
        fp8: linear layers multiply in fp8.
        recomputed_matmuls: share of a block's products that selective checkpointing repeats. Ours repeats none.
        efficiency: other numbers than the calibrated ones.
    """
    eff = efficiency or Efficiency()
    layers = stage_layers(shape, layout)
    recompute = {"none": 0.0, "full": 1.0, "selective": recomputed_matmuls}[work.checkpointing]
    peak = 1e12 * (cluster.peak_bf16_tflops if work.element == 2 else cluster.peak_fp32_tflops)
    products = 1e12 * cluster.peak_fp8_tflops * eff.fp8 if fp8 else peak * eff.matmul

    block_flops = 2 * work.tokens * shape.block_multiplied / layout.tp
    head_flops = 2 * work.tokens * shape.head_multiplied / layout.tp / layout.pp
    # The visible half of the pairs; fused kernels multiply once more in the backward to recompute the scores.
    pair_flops = 2 * work.tokens * work.seq * shape.q_width / layout.tp
    gradients = 1 if shape.is_frozen else 2  # of what went in, and of weights that are trained
    attends_again = 1.0 if work.checkpointing == "full" else 0.0
    forward = {
        "matmul": layers * block_flops / products + head_flops / (peak * eff.matmul),
        "attention": layers * pair_flops / (peak * eff.attention),
    }
    backward = {
        "matmul": layers * (gradients + recompute) * block_flops / products
        + gradients * head_flops / (peak * eff.matmul),
        "attention": layers * (2.5 + attends_again) * pair_flops / (peak * eff.attention),
    }
    moved = layers * _held(shape, work) * eff.traffic / (1e9 * cluster.memory_gb_per_s)
    repeated = 0.0 if work.checkpointing == "none" else 1.0
    forward["traffic"], backward["traffic"] = moved / 3, moved * (2 + repeated) / 3

    arithmetic = {
        "forward": accum * sum(forward.values()),
        "backward": accum * sum(backward.values()),
    }
    sent = _overlapped(transfers(shape, work, layout, accum), arithmetic, cluster, eff.links)

    totals = {key: accum * (forward[key] + backward[key]) for key in forward}
    states = layers * local_numel(shape.trained_block, layout, layout.shards("optimizer"))
    states += local_numel(shape.trained_rest, layout, layout.shards("optimizer"))
    optimizer = _OPTIMIZER_TRAFFIC * states / (1e9 * cluster.memory_gb_per_s)
    waits = (layout.pp - 1) / layout.pp_chunks / accum
    bubble = waits * (sum(totals.values()) + sum(s.exposed_s for s in sent))
    return StepTime(
        matmul_s=totals["matmul"],
        attention_s=totals["attention"],
        traffic_s=totals["traffic"],
        optimizer_s=optimizer,
        bubble_s=bubble,
        sent=sent,
    )


def _overlapped(
    found: list[Transfer], arithmetic: dict[str, float], cluster: ClusterOptions, links: float
) -> tuple[Sent, ...]:
    """Work out what the arithmetic of its phase hides of each transfer."""
    seconds = [t.seconds(cluster, links) for t in found]
    behind = dict.fromkeys(arithmetic, 0.0)
    for transfer, time in zip(found, seconds, strict=True):
        if transfer.hidden:
            behind[transfer.phase] += time
    # Of what can hide, the share that is too long for the arithmetic of its phase.
    shows = {p: max(0.0, 1 - arithmetic[p] / t) if t else 0.0 for p, t in behind.items()}
    return tuple(
        Sent(transfer, time, time * (shows[transfer.phase] if transfer.hidden else 1.0))
        for transfer, time in zip(found, seconds, strict=True)
    )


_OPTIMIZER_TRAFFIC = 32
"""Bytes per weight that a step of AdamW reads (gradient twice, weight, two moments) and writes (weight, two moments)."""


def _held(shape: ModelShape, work: MicroBatch) -> int:
    """Return what a block would hold without recomputation, as a measure of what moves through memory."""
    held = block_held(shape, work)
    return held.attention + held.feed_forward
