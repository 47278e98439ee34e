"""Bytes that DeepSpeed's ZeRO holds on one process beside activations: copies of weights, gradients, buckets.

Closed formulas, read off deepspeed 0.19. N is the number of weights, e the size of a number of the heavy arithmetic,
D the number of processes that share. The library pads each part to a few numbers more, which is left out.
"""

from __future__ import annotations

from distllm.config.activations import Moment
from distllm.config.layout import Layout, local_numel
from distllm.config.shapes import ModelShape

_FP32 = 4
MAX_LIVE = 10**9
"""Gathered weights that stage 3 keeps for their next use (`stage3_max_live_parameters`)."""


class ZeroMemory:
    """What one engine of stage 1, 2 or 3 holds for one model."""

    def __init__(self, shape: ModelShape, element: int, layout: Layout, accum: int) -> None:
        self.stage, self.accum, self.e, self.layers = (
            layout.zero_stage,
            accum,
            element,
            shape.n_layers,
        )
        self.block, self.rest = (
            local_numel(shape.block, layout, 1),
            local_numel(shape.rest, layout, 1),
        )
        self.numel = self.layers * self.block + self.rest
        self.share = -(-self.numel // layout.dp_shard)
        self.bucket = layout.bucket_mib * 2**20 // _FP32
        self.offloads_optimizer, self.offloads_weights = (
            layout.offload_optimizer,
            layout.offload_weights,
        )

    @property
    def lowered(self) -> int:
        """Weights in the dtype of the arithmetic: whole up to stage 2."""
        return self.e * (self.share if self.stage == 3 else self.numel)

    @property
    def master(self) -> int:
        """Their fp32 originals, which there are beside fp32 weights too."""
        return _FP32 * self.share

    @property
    def gathered(self) -> int:
        """Whole weights at stage 3. A model below the library's limit stays gathered from the forward to the update."""
        return self.e * min(self.numel, MAX_LIVE + self.block + self.rest) if self.stage == 3 else 0

    @property
    def _standing(self) -> int:
        """Gradients that have their place all the time."""
        if self.stage == 3:
            return _FP32 * self.share
        if self.stage == 1 and self.e < _FP32:
            return _FP32 * self.numel
        collected = self.numel if self.stage == 1 else self.share
        return _FP32 * collected if self.accum > 1 else 0

    def gradients_at(self, moment: Moment) -> int:
        """Return the bytes of gradients, finished or still to be summed."""
        if not moment.in_backward:
            return self._standing
        finished = (self.layers - moment.blocks) * self.block
        found = self._standing + self.e * (moment.part + moment.rest)
        if self.stage == 1 and (self.e < _FP32 or self.accum == 1):
            found += self.e * finished  # whole until the end of the backward
        elif self.stage == 2 and self.accum == 1:
            found += _FP32 * finished * self.share // self.numel
        return found

    @property
    def after_backward(self) -> int:
        """Gradients when the last of them, the embedding's, is there and not summed yet."""
        if self.stage == 1:
            return (self._standing if self.e < _FP32 else 0) + self.e * self.numel
        return _FP32 * self.share + self.e * self.rest

    @property
    def at_update(self) -> int:
        """Gradients while the weights change: this process's part, and a flat copy of it where it lies in pieces."""
        if self.stage == 1 and self.e < _FP32:
            return self._standing
        in_pieces = self.stage == 3 or self.e == _FP32
        return _FP32 * self.share * (2 if in_pieces else 1)

    def at(self, moment: Moment) -> int:
        """Return the bytes of gathered weights and of the bucket that gradients are collected in."""
        if self.stage == 3:
            return self.gathered + _FP32 * self.bucket
        return self.e * self.bucket if moment.in_backward else 0
