"""From what the reward function said to what is learned from: clipping, scaling, length, truncation, whitening.

The order is fixed and stated here; comparisons between responses (groups, baselines) come later, in the algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distllm.rl.advantages import whiten
from distllm.rl.options import RLOptions
from distllm.types import Rollout


def shape_rewards(
    rollouts: Sequence[Rollout], options: RLOptions, max_response_tokens: int
) -> None:
    """Set `reward` of each rollout from its `score`.

    In this order: clip to `reward_clip`, multiply by `reward_scale`, subtract what `overlong_buffer` and `truncated`
    ask for, divide by the standard deviation over the batch (`whiten_rewards`). NaN, for a response that could not be
    scored or is masked, passes through and counts in no statistic.

    Args:
        rollouts: every response of the batch.
        options: the stage's.
        max_response_tokens: the budget, `generation.max_new_tokens`.
    """
    for rollout in rollouts:
        rollout.reward = _shaped(rollout, options, max_response_tokens)
    if options.whiten_rewards:
        scored = [r for r in rollouts if math.isfinite(r.reward)]
        rewards = torch.tensor([r.reward for r in scored], dtype=torch.float64)
        for rollout, reward in zip(scored, whiten(rewards, shift_mean=False).tolist(), strict=True):
            rollout.reward = reward


def overlong(length: int, budget: int, buffer: float) -> float:
    """Return how far a response of `length` tokens reaches into the last `buffer` of its budget, 0 to 1.

    Reference: Yu et al. 2025, arXiv 2503.14476, "soft overlong punishment".
    """
    span = buffer * budget
    return min(1.0, max(0.0, (length - (budget - span)) / span)) if span > 0 else 0.0


def _shaped(rollout: Rollout, options: RLOptions, budget: int) -> float:
    reward = rollout.score
    if not math.isfinite(reward):
        return math.nan
    if options.reward_clip:
        reward = max(-options.reward_clip, min(options.reward_clip, reward))
    reward *= options.reward_scale
    if options.overlong_buffer:
        length = len(rollout.response_ids)
        reward -= options.overlong_penalty * overlong(length, budget, options.overlong_buffer)
    if rollout.finish_reason == "length":
        if options.truncated == "penalise":
            reward -= options.truncated_penalty
        elif options.truncated == "mask":
            reward = math.nan
    return reward
