"""Bytes that DeepSpeed's ZeRO holds on one process beside activations: copies of weights, gradients, buckets.

Closed formulas, read off deepspeed 0.19. N is the number of trained weights, e the size of a number of the heavy
arithmetic, D the number of processes that share. Up to stage 2 the library lays matrices and vectors into two flat
groups and cuts those; stage 3 cuts every parameter by itself. Both pad what does not divide.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from distllm.config.activations import Moment
from distllm.config.layout import Layout
from distllm.config.shapes import ModelShape

_FP32 = 4
MAX_LIVE = 10**9
"""Gathered weights that stage 3 keeps for their next use (`stage3_max_live_parameters`)."""
SUBGROUP = 10**9
"""Weights of one process that stage 3 updates at a time (`sub_group_size`)."""
AT_ONCE = 5 * 10**8
"""Stage 1 sums the gradients of bf16 weights in a copy, if a group has no more of them."""


class ZeroMemory:
    """What one engine of stage 1, 2 or 3 holds for one model."""

    def __init__(self, shape: ModelShape, element: int, layout: Layout, accum: int) -> None:
        self.stage, self.accum, self.e, self.layers = (
            layout.zero_stage,
            accum,
            element,
            shape.n_layers,
        )
        self.offloads, self.is_lowered = layout.offload_optimizer, element < _FP32
        shards, self.bucket = layout.dp_shard, layout.bucket_mib * 2**20 // _FP32
        trained = [*shape.trained_block * shape.n_layers, *shape.trained_rest]
        sizes = [math.prod(size) for size in trained]
        self.block, self.rest = (
            sum(map(math.prod, part)) for part in (shape.trained_block, shape.trained_rest)
        )
        self.numel, every = sum(sizes), [*shape.block * shape.n_layers, *shape.rest]
        self.gathered_block, self.gathered_rest = (
            sum(map(math.prod, part)) for part in (shape.block, shape.rest)
        )
        groups = [
            [math.prod(size) for size in trained if (len(size) > 1) is flag]
            for flag in (True, False)
        ]
        if self.stage == 3:
            self.share = sum(-(-size // shards) for size in sizes)
            self.held = sum(-(-math.prod(size) // shards) for size in every)
        else:
            parts = [-(-sum(group) // (2 * shards)) * 2 for group in groups]
            self.share = sum(parts)
            self.held = self.share * shards + sum(map(math.prod, every)) - self.numel
            self._own = sum(map(_touched, groups, parts, [shards, shards]))
            self._oversized = _touched(groups[0], parts[0], shards, self.bucket)
        self._group = sum(groups[0])
        self.largest, self.middle = (
            max(map(math.prod, part), default=0) for part in (trained, shape.trained_block)
        )

    @property
    def lowered(self) -> int:
        """Weights in the dtype of the arithmetic: whole up to stage 2."""
        return self.e * self.held

    @property
    def master(self) -> int:
        """Their fp32 originals, which there are beside fp32 weights too."""
        return _FP32 * self.share

    @property
    def host(self) -> int:
        """What the offloaded optimizer has in the host's memory beside originals and moments."""
        if not self.offloads:
            return 0
        found = _FP32 * self.share  # gradients
        if self.stage == 3:
            return 2 * found  # as they come in, and as the update takes them
        found += self.e * (
            self.share + self.largest
        )  # the updated weights, and one parameter on its way
        if self.accum > 1 and not self.is_lowered:
            found += self.e * self._own
        return found

    @property
    def gathered(self) -> int:
        """Whole weights at stage 3. A model below the library's limit stays gathered from the forward to the update."""
        if self.stage < 3:
            return 0
        whole = self.layers * self.gathered_block + self.gathered_rest
        return self.e * min(whole, MAX_LIVE + self.gathered_block + self.gathered_rest)

    @property
    def _part(self) -> int:
        """Finished gradients of this process's part, where they have their place on the device.

        Beside bf16 weights they are summed in fp32. fp32 gradients stay as the parameters they belong to, those across
        the part's borders whole.
        """
        if self.stage == 3:
            return 0 if self.offloads else _FP32 * self.share
        if self.is_lowered:
            return _FP32 * self.share
        return 0 if self.offloads else _FP32 * self._own

    @property
    def _standing(self) -> int:
        """Gradients that there are before the backward."""
        if self.stage == 3:
            return self._part
        earlier = self.accum > 1
        if self.stage == 2:
            return self._part * earlier
        if self.is_lowered and not self.offloads:
            return _FP32 * self.numel + self.e * self.numel * earlier
        return _FP32 * self.numel * earlier

    def gradients_at(self, moment: Moment) -> int:
        """Return the bytes of gradients outside buckets."""
        if not moment.in_backward:
            return self._standing
        done = self._done(moment)
        if self.stage == 3:  # a block's are kept until all of them are there
            return self._standing + self.e * moment.part
        if self.stage == 2:
            if done <= self.bucket:
                return self._standing
            found = self._part + min(self._large, self.e * done)
            # fp32: the next micro-batch's are brought together beside those of the last.
            return found + (0 if self.is_lowered else self._standing)
        if self.accum > 1:
            return self._standing
        return self._standing + self._whole_e * done

    def _done(self, moment: Moment) -> int:
        return (self.layers - moment.blocks) * self.block + moment.part + moment.rest

    @property
    def _whole_e(self) -> int:
        """Bytes of each gradient that waits for the end of the backward at stage 1."""
        return _FP32 if self.offloads else self.e

    @property
    def _large(self) -> int:
        """Gradients of this process's part that are too large for a bucket stay beside their sums (stage 2, bf16)."""
        return self.e * self._oversized if self.is_lowered else 0

    @property
    def after_backward(self) -> int:
        """Most gradients up to the moment when the last of them, the embedding's, is there."""
        if self.stage == 3:
            return self._part + self.e * max(self.block, self.rest)
        if self.stage == 2:
            twice = self.accum > 1 and not self.is_lowered
            alone = self.e * self.largest * (self.largest > self.bucket)
            return self._part * (1 + twice) + max(self._large, alone)
        if self.is_lowered and not self.offloads:
            return (_FP32 + self.e) * self.numel
        # The first bucket's have moved into it when the part's own place is made.
        moved = min(self.bucket, self.numel)
        return max(_FP32 * self.numel, _FP32 * (self.numel - moved) + self._part)

    @property
    def at_update(self) -> int:
        """Gradients while the weights change: this process's part, and a flat copy of it where it lies in pieces."""
        if self.stage == 3:
            return 0 if self.offloads else _FP32 * (self.share + min(self.share, SUBGROUP))
        if self.stage == 1 and self.is_lowered and not self.offloads:
            return (_FP32 + self.e) * self.numel
        in_pieces = not self.is_lowered and not self.offloads
        return self._part + (_FP32 * self.share if in_pieces else 0)

    def _summing(self, done: int, largest: int) -> int:
        """Return what it takes to sum a bucket, or a gradient too large for one.

        Args:
            done: gradients that there are.
            largest: the largest of them.
        """
        if done <= self.bucket:
            return 0
        size = max(self.bucket, largest)
        if self.stage == 3:
            return _FP32 * size * (2 if self.is_lowered and largest > self.bucket else 1)
        if self.stage == 2 and self.is_lowered:
            return (self.e + _FP32) * size
        return (
            _FP32 * size if size > self.share else 0
        )  # it is copied where it goes to more than one process

    def at(self, moment: Moment) -> int:
        """Return the bytes of gathered weights and of the bucket that gradients are collected in."""
        if self.stage == 3:
            return self.gathered + _FP32 * self.bucket
        found = self.e * self.largest if self.offloads else 0
        if self.stage == 1 and self.is_lowered and not self.offloads:
            return found
        stays = self.stage == 1 and self.accum > 1
        if moment.in_backward or stays:
            found += (_FP32 if self.stage == 1 else self.e) * self.bucket
        # Buckets are summed between operations: the most that a feed-forward layer takes for a moment is not there.
        if moment.in_backward and self.stage == 2 and moment.part > self.middle:
            found += self._summing(self._done(moment), self.largest if moment.rest else self.middle)
        return found

    @property
    def buffers_after_backward(self) -> int:
        """The same while the last of the gradients are summed."""
        if self.stage == 1 and self.is_lowered and not self.offloads:
            return _FP32 * self.numel if self._group <= AT_ONCE else 0
        end = Moment(name="", activations=0, logits=0, blocks=0)
        return self.at(end) + self._summing(self.numel, self.largest)

    @property
    def buffers_at_update(self) -> int:
        """The same while the weights change: what is gathered has been given back."""
        if self.stage == 3:
            return _FP32 * self.bucket
        return self.e * self.largest if self.offloads else 0


def _touched(sizes: Sequence[int], part: int, shards: int, above: int = 0) -> int:
    """Count the numbers of all parameters larger than `above` that the fullest part of a flat group reaches into."""
    ends = list(accumulate(sizes))
    counted = [0, *accumulate(size * (size > above) for size in sizes)]
    most = 0
    for first in range(0, min(part * shards, sum(sizes)), max(part, 1)):
        last = min(first + part, ends[-1])
        most = max(most, counted[bisect_left(ends, last) + 1] - counted[bisect_right(ends, first)])
    return most
