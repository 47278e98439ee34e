"""Rollouts and algorithms written by hand, for tests of RL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distllm import registry
from distllm.rl.algorithm import Algorithm
from distllm.testing.tiny import PAD_ID
from distllm.types import Rollout


def make_rollout(prompt: Sequence[int], response: Sequence[int], **fields: Any) -> Rollout:
    """Build a rollout; per-token fields are given as lists and become float64 tensors."""
    tokens = {
        k: torch.tensor(v, dtype=torch.bool if k == "loss_mask" else torch.float64)
        for k, v in fields.items()
        if isinstance(v, list)
    }
    rest = {k: v for k, v in fields.items() if k not in tokens}
    rest.setdefault("score", rest.get("reward", 0.0))
    return Rollout(
        prompt_ids=list(prompt),
        response_ids=list(response),
        rollout_logprobs=tokens.pop(
            "rollout_logprobs", torch.zeros(len(response), dtype=torch.float64)
        ),
        finish_reason=rest.pop("finish_reason", "stop"),
        prompt_index=rest.pop("prompt_index", 0),
        **tokens,
        **rest,
    )


def make_algorithm(
    name: str,
    model: Any,
    *,
    temperature: float = 1.0,
    batch_size: int = 4,
    max_response_tokens: int = 8,
    on_policy: bool = False,
    pad_id: int = PAD_ID,
    **options: Any,
) -> Algorithm:
    """Build the algorithm `name` with `options` on top of its defaults."""
    cls = registry.get("algorithm", name)
    return cls(
        cls.Options(**options),
        join=model.join,
        pad_id=pad_id,
        temperature=temperature,
        batch_size=batch_size,
        max_response_tokens=max_response_tokens,
        on_policy=on_policy,
    )
