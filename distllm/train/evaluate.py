"""What a stage measures on held-out data. Each function runs without gradient and leaves the engine as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.data.datasets import PairExample, PromptExample
from distllm.data.sampler import Samples
from distllm.data.skills import exact_match
from distllm.data.source import final_answer
from distllm.engines.base import Engine
from distllm.generation.backend import Sampler, sample_alone
from distllm.generation.options import GenerationOptions
from distllm.generation.rollouts import spread
from distllm.objectives.reward import Reward, score
from distllm.train.intervals import expected_calibration_error, slope_through_origin, wilson
from distllm.types import Batch, LossOutput, Model, Objective, Rollout, sum_by_key


def evaluate_loss(
    engine: Engine, objective: Objective, examples: Samples[Any], batch_size: int
) -> dict[str, float]:
    """Return `eval/loss` = sum_k coef_k * loss_k / weight_k over all examples, and the objective's metrics."""
    parts = []
    for chosen, counts in engine.share(len(examples), batch_size):
        batch = objective.collate([examples[i] for i in chosen]).to(engine.device)
        out = engine.infer(_loss, objective, batch)
        flat = {f"{k}/loss": v for k, v in out.losses.items()}
        flat |= {f"{k}/total": v for k, v in objective.weights(batch).items()}
        flat |= {f"{k}/sum": v[0] for k, v in out.metrics.items()}
        flat |= {f"{k}/weight": v[1] for k, v in out.metrics.items()}
        parts.append({k: v.double() * counts for k, v in flat.items()})
    sums = {k: v.item() for k, v in engine.all_sum(sum_by_key(parts)).items()}
    means = {k: v / sums[f"{k[:-4]}/weight"] for k, v in sums.items() if k.endswith("/sum")}
    loss = sum(
        c * sums[f"{k}/loss"] / sums[f"{k}/total"] for k, c in objective.coefficients.items()
    )
    return {"eval/loss": loss} | {f"eval/{k[:-4]}": v for k, v in means.items()}


def _loss(model: Model, objective: Objective, batch: Batch) -> LossOutput:
    return objective.loss(model, batch)


@dataclass(slots=True)
class Answers:
    """Responses to held-out prompts."""

    prompts: list[PromptExample]
    rollouts: list[Rollout]
    texts: list[str]
    answer_after: str = ""
    """What stands behind the last of these words in a response is its answer; empty: all of it is."""

    @property
    def correct(self) -> list[bool]:
        """Whether each response equals its prompt's answer."""
        return [
            exact_match(final_answer(text, self.answer_after), p.prompt.answer or "")
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
    answer_after: str = "",
    sampler: Sampler = sample_alone,
) -> Answers:
    """Answer each prompt once with the engine's model."""
    chosen = list(prompts)
    with engine.sampling() as model:

        def sample(numbers: list[int]) -> list[Rollout]:
            rollouts: list[Rollout] = []
            for start in range(0, len(numbers), batch_size):
                part = [chosen[i] for i in numbers[start : start + batch_size]]
                rollouts += sampler(
                    model,
                    part,
                    options,
                    end_ids=end_ids,
                    pad_id=pad_id,
                    seed=seed,
                    prompt_indices=[p.sample_id for p in part],
                )
            return rollouts

        rollouts = spread(len(chosen), sample)
    return Answers(chosen, rollouts, [decode(r.response_ids) for r in rollouts], answer_after)


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
    scores: dict[int, Tensor] = {}
    for numbers, counts in engine.share(len(pairs), batch_size):
        batch = objective.collate([pairs[i] for i in numbers]).to(engine.device)
        both = engine.infer(score, batch).double().cpu().view(2, -1).unbind(dim=1)
        scores |= zip(numbers, both, strict=True) if counts else {}
    chosen, rejected = torch.stack(engine.gather(scores, len(pairs))).unbind(dim=1)
    return chosen, rejected


def preference_metrics(
    margins: Tensor, pairs: Sequence[PairExample], scale: float = 1.0
) -> dict[str, float]:
    """Return pairwise accuracy with its 95% interval, in all and by kind of pair, calibration, and what length does.

    A tie counts half. `length_only_accuracy` is what the better of the two rules "prefer the longer" and "prefer the
    shorter" would get: near 0.5 means that length gives nothing away. `length_slope` is how much of the margin goes
    with each token by which one answer is longer.

    Args:
        margins: [pairs]: score of the chosen answer minus that of the rejected one.
        pairs: what was judged.
        scale: turns margins into logits of the preference (a reward model's spread before it was normalised).
    """
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    low, high = wilson(right.sum().item(), len(right))
    longer = torch.tensor([float(len(p.chosen_ids) - len(p.rejected_ids)) for p in pairs])
    prefer_longer = ((longer > 0).double() + 0.5 * (longer == 0).double()).mean().item()
    metrics = {
        "eval/accuracy": right.mean().item(),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/ece": expected_calibration_error(*surety(margins, scale)),
        "eval/length_only_accuracy": max(prefer_longer, 1 - prefer_longer),
        "eval/num_pairs": float(len(pairs)),
    }
    if longer.any():
        slope = slope_through_origin(longer.tolist(), margins.tolist())
        names = ("length_slope", "length_slope_low", "length_slope_high")
        metrics |= {f"eval/{name}": value for name, value in zip(names, slope, strict=True)}
    kinds = sorted({p.kind for p in pairs if p.kind})
    for kind in kinds:
        members = torch.tensor([p.kind == kind for p in pairs])
        metrics[f"eval/accuracy_{kind}"] = right[members].mean().item()
        metrics[f"eval/share_{kind}"] = members.double().mean().item()
    return metrics


def surety(margins: Tensor, scale: float = 1.0) -> tuple[list[float], list[bool]]:
    """Return, for each pair, the probability given to the preferred answer, and whether it is the chosen one."""
    chance = torch.sigmoid(margins * scale)
    return torch.maximum(chance, 1 - chance).tolist(), (margins > 0).tolist()
