"""The stage `multi_reward`: one reward model for several objectives, and what is measured of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from distllm.data.datasets import PairExample
from distllm.engines.base import Engine
from distllm.errors import DataError
from distllm.objectives.multi_reward import MultiReward, MultiRewardOptions, side_scores
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import NUM_SAMPLES_SHOWN, Measure, pair_dataset
from distllm.pipeline.parts import supervised_parts
from distllm.pipeline.verdicts import known_labels, predict
from distllm.train.evaluate import evaluate_loss, preference_metrics


def build(builder: Builder) -> Parts:
    """Build a stage that learns a score per objective; the objectives are those of the data.

    Raises:
        DataError: there is only one objective, or the model to start from does not know one.
    """
    records = builder.data.compared("train")
    found = sorted({name for r in records for name in r.objectives})
    if len(found) < 2:
        raise DataError(
            f"The data has one objective only: {found[0]}. Write what is better by it as chosen, and set stage=reward."
        )
    names = known_labels(builder, found)
    model = builder.model("classify", num_labels=len(names))
    model.label_names = names
    objective = MultiReward(builder.config.stage, builder.pad_id, model.join, names)
    engine = builder.engine("model", model, trained=True)
    train = pair_dataset(builder, records)
    measure = measure_objectives(builder, engine, names)
    return supervised_parts(builder, engine, objective, train, measure)


def measure_objectives(builder: Builder, engine: Engine, names: Sequence[str]) -> Measure:
    """By each objective: accuracy with its interval, calibration and what length does, as of a reward model.

    The metrics are `eval/OBJECTIVE/...`, of the pairs that it compares and does not call equal.
    """
    train = builder.config.train
    model: Any = engine.model
    objective = MultiReward(MultiRewardOptions(), builder.pad_id, model.join, names)
    dataset = pair_dataset(builder, builder.data.compared("heldout")[: train.num_eval_samples])
    pairs = [dataset[i] for i in range(len(dataset))]

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, pairs, train.micro_batch_size)
        found = predict(engine, objective, pairs, train.micro_batch_size, side_scores)
        scores = torch.stack(found).double()
        for k, name in enumerate(names):
            sides = [better_first(pair, name) for pair in pairs]
            told = [i for i, side in enumerate(sides) if side is not None]
            if told:
                chosen = torch.tensor([pairs[i].objectives[name] > 0.5 for i in told])
                margins = scores[told, 0, k] - scores[told, 1, k]
                judged = preference_metrics(
                    torch.where(chosen, margins, -margins), [s for s in sides if s is not None]
                )
                of = f"eval/{name}/"
                metrics |= {key.replace("eval/", of, 1): value for key, value in judged.items()}
        shown = [
            {
                "prompt": r.prompt[-1]["content"],
                "chosen": r.chosen,
                "rejected": r.rejected,
                "objectives": r.objectives,
                "chosen_scores": dict(zip(names, scores[i, 0].tolist(), strict=True)),
                "rejected_scores": dict(zip(names, scores[i, 1].tolist(), strict=True)),
            }
            for i, r in enumerate(dataset.records[:NUM_SAMPLES_SHOWN])
        ]
        return metrics, shown

    return measure


def better_first(pair: PairExample, name: str) -> PairExample | None:
    """Return the pair with the answer that the objective prefers as the chosen one; None where it prefers neither."""
    chance = pair.objectives.get(name, 0.5)
    if chance == 0.5:
        return None
    if chance > 0.5:
        return pair
    return replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
