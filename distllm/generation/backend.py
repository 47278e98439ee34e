"""What a back end of sampling must offer, the one that is built in, and the check that each must pass before it is used.

A server beside the run (its weights loaded by `sync`, its memory given back by `sleep`) fits here without a change to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distllm.errors import EngineError
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.layers.precision import compute_dtype
from distllm.types import Model, Rollout

MAX_GAP = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Dtype of the computation -> largest mean |difference| of log-probabilities, in nats per token."""


class Sampler(Protocol):
    """Prompts in; ids, log-probabilities and reasons to finish out. All ranks make the same calls."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Any],
        options: GenerationOptions,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        seed: int,
        prompt_indices: Sequence[int],
        num_samples: int = 1,
    ) -> list[Rollout]:
        """Return `num_samples` responses to each encoded prompt (`.prompt_ids`), in order; noise as `generate` says."""
        ...

    def sync(self, model: Any) -> None:
        """Take over the weights of the policy and forget every cache that older ones have filled."""
        ...

    def sleep(self) -> None:
        """Give back the memory that only sampling needs; the next `sync` wakes it."""
        ...


class Alone:
    """The policy's own module, in this process: nothing is copied, so there is nothing to sync."""

    def __call__(
        self, model: Any, prompts: Sequence[Any], options: GenerationOptions, **settings: Any
    ) -> list[Rollout]:
        """Sample with `generate`."""
        return generate(model, [p.prompt_ids for p in prompts], options, **settings)

    def sync(self, model: Model) -> None:
        """Nothing: the weights are the policy's, and the cache lives for one call."""

    def sleep(self) -> None:
        """Nothing: the cache is gone when the call returns."""


sample_alone = Alone()
"""The back end of every run that names no other."""


def check_parity(
    sampler: Sampler,
    model: Any,
    prompts: Sequence[Any],
    options: GenerationOptions,
    score: Callable[[Sequence[Rollout]], Sequence[Tensor]],
    *,
    end_ids: Sequence[int],
    pad_id: int,
) -> float:
    """Hold a back end's log-probabilities to those that are learned from, before it is used.

    Args:
        sampler: the back end; it is synced and put to sleep again.
        model: the policy.
        prompts: a few encoded prompts, best of uneven lengths.
        options: as in the run.
        score: the trainer's log-probabilities of the responses, [response] each.
        end_ids: tokens that end a response.
        pad_id: fills rectangles.

    Returns:
        the mean absolute difference over the tokens that the policy sampled, in nats.

    Raises:
        EngineError: it is above `MAX_GAP`, or the back end returns other fields than it must.
    """
    sampler.sync(model)
    rollouts = sampler(
        model,
        prompts,
        options,
        end_ids=end_ids,
        pad_id=pad_id,
        seed=0,
        prompt_indices=range(len(prompts)),
        num_samples=2,
    )
    sampler.sleep()
    order = [(r.prompt_index, r.sample_index) for r in rollouts]
    if order != [(p, s) for p in range(len(prompts)) for s in range(2)]:
        raise EngineError(
            f"The sampler {type(sampler).__name__} returns responses in the order {order[:6]} ..., not prompt by prompt."
        )
    gaps = []
    for rollout, scored in zip(rollouts, score(rollouts), strict=True):
        gap = (rollout.rollout_logprobs.double() - scored.double()).abs()
        gaps.append(gap if rollout.loss_mask is None else gap[rollout.loss_mask])
    mean = torch.cat(gaps).mean().item()
    limit = MAX_GAP[compute_dtype(next(iter(model.parameters())))]
    if not mean <= limit:
        raise EngineError(
            f"The sampler {type(sampler).__name__} reports log-probabilities {mean:.2g} nats a token away from those that "
            f"are learned from; at most {limit:g} is rounding. Its weights, temperature or token set are others."
        )
    return mean
