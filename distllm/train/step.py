"""One optimizer step and the law it obeys.

    gradient = sum over terms k of coef_k * d(sum of loss_k) / (sum of weight_k)

Both sums run over all micro-batches and all data-parallel ranks, and the weights are summed before the first
backward. So any split of the same sequences into ranks and micro-batches gives the same gradient; a mean of means
would not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from distllm.engines.base import Engine
from distllm.errors import DataError
from distllm.train.micro_batches import num_tokens, sample_ids
from distllm.types import Batch, Objective, sum_by_key


@dataclass(slots=True)
class StepResult:
    """What one optimizer step did; numbers are over all ranks."""

    loss: float
    """sum_k coef_k * loss_k / weight_k."""
    grad_norm: float
    """Global norm before clipping; nan when the step was skipped."""
    skipped: bool
    """True when loss or gradient was not finite and the weights were left alone."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`loss_<term>` per term, and the objective's own metrics."""
    num_tokens: int = 0
    """Tokens that are not padding."""


def optimizer_step(
    engine: Engine, objective: Objective, micro_batches: Sequence[Batch], lr: float
) -> StepResult:
    """Learn from `micro_batches` once. All ranks take part.

    Raises:
        DataError: a term has no weight at all, so there is nothing to learn from.
    """
    totals = engine.all_sum(sum_by_key(objective.weights(batch) for batch in micro_batches))
    for term, total in totals.items():
        if not total > 0:
            raise DataError(
                f"The step's batch holds no target for `{term}`: samples {sample_ids(micro_batches)}."
            )

    local = engine.forward_backward(objective, micro_batches, totals)

    flat = {f"loss_{k}": v for k, v in local.losses.items()}
    flat |= {f"{k}/sum": v[0] for k, v in local.metrics.items()}
    flat |= {f"{k}/weight": v[1] for k, v in local.metrics.items()}
    flat["tokens"] = torch.tensor(float(sum(map(num_tokens, micro_batches))))
    sums = {k: v.item() for k, v in engine.all_sum(flat).items()}

    metrics = {f"loss_{k}": sums[f"loss_{k}"] / totals[k].item() for k in local.losses}
    loss = sum(objective.coefficients[k] * metrics[f"loss_{k}"] for k in local.losses)
    for k in local.metrics:
        metrics[k] = sums[f"{k}/sum"] / max(sums[f"{k}/weight"], 1e-12)

    norm = None
    if math.isfinite(loss):
        norm = engine.update(lr)
    else:
        engine.discard()
    tokens = int(sums["tokens"])
    return StepResult(loss, math.nan if norm is None else norm, norm is None, metrics, tokens)
