"""What processes send each other in one step: which collective, how many bytes, over which links, hidden behind what.

Bytes are those that one process receives. Times follow the slower of two roads: inside a machine at the rate of its own
links, between machines at the network's, where every process of the group on a machine brings its own connection.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config.activations import MicroBatch
from distllm.config.layout import Layout, stage_layers
from distllm.config.shapes import ModelShape
from distllm.engines.cluster import ClusterOptions

_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "send": 1}
"""How often the data goes around: an all-reduce is a reduce-scatter and an all-gather."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of collective within a step."""

    name: str
    kind: str
    """all_gather, reduce_scatter, all_reduce or send."""
    num_bytes: float
    """Of the whole tensor, per call."""
    calls: float
    """Per optimizer step."""
    group: int
    """Processes that take part."""
    stride: int
    """Distance in rank between neighbours of the group: those with a smaller distance share a machine first."""
    phase: str
    """forward, backward or update."""
    hidden: bool
    """Can run behind the arithmetic of its phase."""

    @property
    def received(self) -> float:
        """Bytes that one process receives per step."""
        share = (self.group - 1) / self.group if self.kind != "send" else 1.0
        return _ROUNDS[self.kind] * self.num_bytes * share * self.calls

    def seconds(self, cluster: ClusterOptions, efficiency: float) -> float:
        """Return the time of all calls of a step; `efficiency` is the share of the links' rate that is reached."""
        if self.group == 1:
            return 0.0
        per_node = max(1, min(self.group, cluster.gpus_per_node // self.stride))
        nodes = -(-self.group // per_node)
        rounds = _ROUNDS[self.kind]
        if self.kind == "send":
            inside, across = (0.0, 1.0) if self.stride >= cluster.gpus_per_node else (1.0, 0.0)
        else:
            inside = (self.group - 1) / self.group if per_node > 1 else 0.0
            across = (nodes - 1) / nodes / per_node
        road = max(inside / cluster.node_gb_per_s, across / cluster.network_gb_per_s) / 1e9
        hops = (per_node - 1) * cluster.node_latency_us + (nodes - 1) * cluster.network_latency_us
        return self.calls * rounds * (self.num_bytes * road / efficiency + hops * 1e-6)


def transfers(
    shape: ModelShape, work: MicroBatch, layout: Layout, accum: int, reduce_bytes: int = 4
) -> list[Transfer]:
    """List what a step of `accum` micro-batches sends.

    Args:
        shape: of the model.
        work: one micro-batch.
        layout: of the engine.
        accum: micro-batches per step.
        reduce_bytes: bytes of a gradient when it is summed.
    """
    found = [*_tensor_parallel(shape, work, layout, accum), *_pipeline(shape, work, layout, accum)]
    stage = layout.zero_stage
    if layout.dp == 1:
        return found
    layers = stage_layers(shape, layout)
    block = sum(_numel(s) for s in shape.block) / layout.tp
    rest = sum(_numel(s) for s in shape.rest) / layout.tp
    trained_block, trained_rest = (
        sum(_numel(s) for s in sizes) / layout.tp
        for sizes in (shape.trained_block, shape.trained_rest)
    )
    shard, stride = layout.dp_shard, layout.tp
    if stage == 3:
        e = work.element
        # The root (embeddings, head) is gathered in fp32 and stays so from forward to backward.
        found += [
            Transfer("gather weights", "all_gather", e * block, layers * accum,
                     shard, stride, "forward", True),
            Transfer("gather embedding and head", "all_gather", 4 * rest, accum,
                     shard, stride, "forward", False),
        ]  # fmt: skip
        if layout.reshard:
            found.append(
                Transfer("gather weights again", "all_gather", e * block, layers * accum,
                         shard, stride, "backward", True)
            )  # fmt: skip
    if stage >= 2:
        calls = 1 if layout.reduces_once else accum
        found.append(
            Transfer("scatter gradients", "reduce_scatter", reduce_bytes * trained_block, layers * calls,
                     shard, stride, "backward", True)
        )  # fmt: skip
        if trained_rest:
            found.append(
                Transfer("scatter the embedding's gradient", "reduce_scatter", reduce_bytes * trained_rest,
                         calls, shard, stride, "backward", False)
            )  # fmt: skip
    elif stage == 1:
        found.append(
            Transfer("scatter gradients", "reduce_scatter",
                     reduce_bytes * (layers * trained_block + trained_rest), 1, shard, stride, "backward", True)
        )  # fmt: skip
    if stage in (1, 2):
        found.append(
            Transfer("gather updated weights", "all_gather", work.element * (layers * block + rest),
                     1, shard, stride, "update", False)
        )  # fmt: skip
    if layout.dp_replicate > 1:
        share = shard if stage >= 1 else 1
        found.append(
            Transfer("sum gradients over replicas", "all_reduce",
                     reduce_bytes * (layers * trained_block + trained_rest) / share, 1,
                     layout.dp_replicate, shard * stride, "backward", True)
        )  # fmt: skip
    return found


def _tensor_parallel(
    shape: ModelShape, work: MicroBatch, layout: Layout, accum: int
) -> list[Transfer]:
    """Sequence parallel: gather the stream before attention and feed-forward, scatter the sums behind them.

    Reference: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.
    """
    if layout.tp == 1:
        return []
    stream = work.element * work.tokens * shape.d_model
    calls = 2 * stage_layers(shape, layout) * accum
    again = 1 if work.checkpointing == "none" else 2
    hidden = layout.overlaps_tp
    return [
        Transfer("gather the stream", "all_gather", stream, calls,
                 layout.tp, 1, "forward", hidden),
        Transfer("scatter the stream", "reduce_scatter", stream, calls,
                 layout.tp, 1, "forward", hidden),
        Transfer("gather the stream's gradient", "all_gather", stream, calls * again,
                 layout.tp, 1, "backward", hidden),
        Transfer("scatter the stream's gradient", "reduce_scatter", stream, calls * again,
                 layout.tp, 1, "backward", hidden),
    ]  # fmt: skip


def _pipeline(shape: ModelShape, work: MicroBatch, layout: Layout, accum: int) -> list[Transfer]:
    if layout.pp == 1:
        return []
    stream = work.element * work.tokens * shape.d_model / layout.tp
    calls = 2 * accum * layout.pp_chunks
    return [
        Transfer("hand on to the next stage", "send", stream, calls,
                 layout.pp, layout.tp * layout.dp, "forward", True)
    ]  # fmt: skip


def _numel(size: tuple[int, ...]) -> int:
    product = 1
    for length in size:
        product *= length
    return product
