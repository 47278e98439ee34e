"""No-gradient passes over finished rollouts: log-probabilities, values, and summaries of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distllm.engines.base import Engine
from distllm.generation.rollouts import TOKEN_FIELDS
from distllm.layers.precision import wide
from distllm.rl.layout import Join, collate_rollouts, hidden_states, per_response
from distllm.types import Batch, Model, Rollout


def score_logprobs(
    engine: Engine,
    rollouts: Sequence[Rollout],
    join: Join,
    pad_id: int,
    temperature: float,
    batch_size: int,
) -> list[Tensor]:
    """Return the log-probability of each response token under `engine`'s model, one [response] per rollout."""

    def run(model: Model, batch: Batch) -> Tensor:
        return model.head.logprobs(hidden_states(model, batch), batch.labels, temperature)[0]

    return _over_batches(run, engine, rollouts, join, pad_id, batch_size)


def score_values(
    engine: Engine, rollouts: Sequence[Rollout], join: Join, pad_id: int, batch_size: int
) -> list[Tensor]:
    """Return the value before each response token, one [response] per rollout."""
    return _over_batches(token_values, engine, rollouts, join, pad_id, batch_size)


def score_last_values(
    engine: Engine, rollouts: Sequence[Rollout], join: Join, pad_id: int, batch_size: int
) -> list[float]:
    """Return the value after the last response token of each rollout (what a truncated one is bootstrapped with)."""
    bare = dict.fromkeys(TOKEN_FIELDS)
    longer = []
    for r in rollouts:
        fields = bare | {"rollout_logprobs": r.rollout_logprobs.new_zeros(len(r.response_ids) + 1)}
        longer.append(replace(r, response_ids=[*r.response_ids, pad_id], **fields))
    values = score_values(engine, longer, join, pad_id, batch_size)
    return [v[-1].item() for v in values]


def token_values(model: Model, batch: Batch) -> Tensor:
    """Return the value model's estimates, [batch, seq]."""
    return model.head.values(hidden_states(model, batch))


def _over_batches(
    run: Any, engine: Engine, rollouts: Sequence[Rollout], join: Join, pad_id: int, batch_size: int
) -> list[Tensor]:
    """Every rank holds all rollouts, computes its share of them, and ends with all results."""
    results: dict[int, Tensor] = {}
    for numbers, counts in engine.share(len(rollouts), batch_size):
        part = [rollouts[i] for i in numbers]
        batch = collate_rollouts(part, join, pad_id).to(engine.device)
        values = engine.infer(run, batch)
        found = per_response(part, batch, values.to(wide(values.dtype)))
        results |= zip(numbers, found, strict=True) if counts else {}
    return engine.gather(results, len(rollouts))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns); 1 is perfect, 0 no better than a constant."""
    variance = returns.var(unbiased=False)
    if variance == 0:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / variance)


def summarise(rollouts: Sequence[Rollout], num_samples: int) -> dict[str, float]:
    """Describe sampled scores and lengths; `rollouts` are ordered prompt by prompt, `num_samples` each."""
    scores = torch.tensor([r.score for r in rollouts], dtype=torch.float64)
    scored = scores[torch.isfinite(scores)]
    lengths = torch.tensor([float(len(r.response_ids)) for r in rollouts])
    logprobs = torch.cat(
        [
            r.rollout_logprobs if r.loss_mask is None else r.rollout_logprobs[r.loss_mask]
            for r in rollouts
        ]
    ).double()
    return {
        "rl/reward_mean": scored.mean().item() if len(scored) else 0.0,
        "rl/reward_std": scored.std(unbiased=False).item() if len(scored) else 0.0,
        "rl/unscored": 1.0 - len(scored) / len(scores),
        "rl/response_length": lengths.mean().item(),
        "rl/response_length_max": lengths.max().item(),
        "rl/response_tokens": lengths.sum().item(),
        # Unbiased, over all responses; `rl/entropy` is exact per token, over those that were learned from.
        "rl/rollout_entropy": -logprobs.mean().item() if len(logprobs) else 0.0,
        "rl/truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rl/reward_length_correlation": _correlation(scores, lengths.double()),
        **(_group_spread(scores.view(-1, num_samples)) if num_samples > 1 else {}),
        **_turns([r.loss_mask for r in rollouts if r.loss_mask is not None]),
    }


def _group_spread(scores: Tensor) -> dict[str, float]:
    """Describe how far the scores of one prompt's responses lie apart; `scores` is [prompts, samples]."""
    groups = [row[torch.isfinite(row)] for row in scores]
    spreads = torch.stack([g.std(unbiased=False) if len(g) else g.new_zeros(()) for g in groups])
    equal = sum(bool(len(g) < 2 or g.min() == g.max()) for g in groups)
    return {"rl/reward_group_std": spreads.mean().item(), "rl/zero_spread": equal / len(groups)}


def _turns(masks: Sequence[Tensor]) -> dict[str, float]:
    """Describe conversations: how often the policy spoke, and the share of the tokens that are its own."""
    if not masks:
        return {}
    begun = [int(m[0]) + int((m[1:] & ~m[:-1]).sum()) for m in masks]
    own = sum(int(m.sum()) for m in masks) / sum(map(len, masks))
    return {"rl/turns": sum(begun) / len(begun), "rl/own_tokens": own}


def _correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation where `x` is finite; 0 where one of the two does not vary."""
    known = torch.isfinite(x)
    x, y = x[known], y[known]
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return 0.0
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
