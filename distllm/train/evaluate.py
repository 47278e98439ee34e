"""What a stage measures on held-out data. Each function runs without gradient and leaves the engine as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.data.datasets import PairExample, PromptExample
from distllm.data.skills import exact_match
from distllm.engines.base import Engine
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.objectives.reward import Reward, score
from distllm.train.intervals import expected_calibration_error, wilson
from distllm.types import Batch, LossOutput, Model, Objective, Rollout, sum_by_key


def evaluate_loss(
    engine: Engine, objective: Objective, examples: Sequence[Any], batch_size: int
) -> dict[str, float]:
    """Return `eval/loss` = sum_k coef_k * loss_k / weight_k over all examples, and the objective's metrics."""
    parts, weights = [], []
    for start in range(0, len(examples), batch_size):
        batch = objective.collate(_slice(examples, start, start + batch_size)).to(engine.device)
        parts.append(engine.infer(_loss, objective, batch))
        weights.append(objective.weights(batch))
    losses = sum_by_key(p.losses for p in parts)
    totals = sum_by_key(weights)
    result = {
        "eval/loss": sum(objective.coefficients[k] * (losses[k] / totals[k]).item() for k in losses)
    }
    sums = sum_by_key({k: v[0] for k, v in p.metrics.items()} for p in parts)
    counts = sum_by_key({k: v[1] for k, v in p.metrics.items()} for p in parts)
    return result | {f"eval/{k}": (sums[k] / counts[k]).item() for k in sums}


def _loss(model: Model, objective: Objective, batch: Batch) -> LossOutput:
    return objective.loss(model, batch)


def _slice(examples: Sequence[Any], start: int, stop: int) -> list[Any]:
    return [examples[i] for i in range(start, min(stop, len(examples)))]


@dataclass(slots=True)
class Answers:
    """Responses to held-out prompts."""

    prompts: list[PromptExample]
    rollouts: list[Rollout]
    texts: list[str]

    @property
    def correct(self) -> list[bool]:
        """Whether each response equals its prompt's answer."""
        return [
            exact_match(text, p.prompt.answer or "")
            for p, text in zip(self.prompts, self.texts, strict=True)
        ]


def answer(
    engine: Engine,
    prompts: Sequence[PromptExample],
    options: GenerationOptions,
    *,
    end_ids: list[int],
    pad_id: int,
    decode: Callable[[list[int]], str],
    seed: int = 0,
    batch_size: int = 128,
) -> Answers:
    """Answer each prompt once with the engine's model."""
    rollouts: list[Rollout] = []
    chosen = list(prompts)
    with engine.sampling() as model:
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            rollouts += generate(
                model,
                [p.prompt_ids for p in part],
                options,
                end_ids=end_ids,
                pad_id=pad_id,
                seed=seed,
                prompt_indices=[p.sample_id for p in part],
            )
    return Answers(chosen, rollouts, [decode(r.response_ids) for r in rollouts])


def exact_match_metrics(answers: Answers) -> dict[str, float]:
    """Return the share of right answers with its 95% interval, in all and per task, and lengths."""
    correct = answers.correct
    low, high = wilson(sum(correct), len(correct))
    metrics = {
        "eval/exact_match": sum(correct) / len(correct),
        "eval/exact_match_low": low,
        "eval/exact_match_high": high,
        "eval/response_length": sum(len(r.response_ids) for r in answers.rollouts) / len(correct),
    }
    by_task: dict[str, list[bool]] = {}
    for prompt, right in zip(answers.prompts, correct, strict=True):
        by_task.setdefault(prompt.prompt.task, []).append(right)
    if len(by_task) > 1:
        for task, rights in sorted(by_task.items()):
            metrics[f"eval/exact_match/{task or 'other'}"] = sum(rights) / len(rights)
    return metrics


def pair_scores(
    engine: Engine, objective: Reward, pairs: Sequence[PairExample], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return the scores of the chosen and of the rejected answers, each [pairs] float64."""
    halves = []
    for start in range(0, len(pairs), batch_size):
        batch = objective.collate(_slice(pairs, start, start + batch_size)).to(engine.device)
        halves.append(engine.infer(score, batch).double().cpu().chunk(2))
    chosen, rejected = zip(*halves, strict=True)
    return torch.cat(chosen), torch.cat(rejected)


def preference_metrics(margins: Tensor, pairs: Sequence[PairExample]) -> dict[str, float]:
    """Return pairwise accuracy with its 95% interval, in all and by kind of pair, and calibration.

    A tie counts half. `length_only_accuracy` is what the better of the two rules "prefer the longer" and "prefer the
    shorter" would get: near 0.5 means that length gives nothing away.
    """
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    low, high = wilson(right.sum().item(), len(right))
    chance = torch.sigmoid(margins)
    confidence = torch.maximum(chance, 1 - chance)
    longer = torch.tensor([float(len(p.chosen_ids) - len(p.rejected_ids)) for p in pairs])
    prefer_longer = ((longer > 0).double() + 0.5 * (longer == 0).double()).mean().item()
    metrics = {
        "eval/accuracy": right.mean().item(),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/ece": expected_calibration_error(confidence.tolist(), (margins > 0).tolist()),
        "eval/length_only_accuracy": max(prefer_longer, 1 - prefer_longer),
        "eval/num_pairs": float(len(pairs)),
    }
    kinds = sorted({p.kind for p in pairs if p.kind})
    for kind in kinds:
        members = torch.tensor([p.kind == kind for p in pairs])
        metrics[f"eval/accuracy_{kind}"] = right[members].mean().item()
        metrics[f"eval/share_{kind}"] = members.double().mean().item()
    return metrics
