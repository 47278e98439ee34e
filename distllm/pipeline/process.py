"""The stage `process`: a reward for each step of a solution, and what is measured of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distllm.data.labelled import STEP_LABELS, StepDataset
from distllm.engines.base import Engine
from distllm.objectives.process import Process, ProcessOptions
from distllm.objectives.tag import tag_logits
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import NUM_SAMPLES_SHOWN, Measure
from distllm.pipeline.parts import supervised_parts
from distllm.pipeline.verdicts import predict
from distllm.train.evaluate import evaluate_loss
from distllm.train.intervals import expected_calibration_error, wilson
from distllm.types import Batch, Model


def build(builder: Builder) -> Parts:
    """Build a stage that learns to judge steps."""
    config = builder.config
    model = builder.model("tag", num_labels=len(STEP_LABELS))
    model.label_names = list(STEP_LABELS)
    train = StepDataset(
        builder.data.stepwise("train"), builder.tokenizer, config.train.seq_len, config.data
    )
    engine = builder.engine("model", model, trained=True)
    objective = Process(config.stage, builder.pad_id)
    return supervised_parts(builder, engine, objective, train, measure_steps(builder, engine))


def measure_steps(builder: Builder, engine: Engine) -> Measure:
    """Accuracy over steps with its interval, calibration, and how often the first wrong step is found.

    `eval/first_error` counts a solution as right where the first step with a probability below one half is its first wrong
    one, or where neither has any (Zheng et al. 2024, arXiv 2412.06559, section 4.1).
    """
    train = builder.config.train
    records = builder.data.stepwise("heldout")[: train.num_eval_samples]
    examples = StepDataset(records, builder.tokenizer, train.seq_len, builder.config.data)
    objective = Process(ProcessOptions(), builder.pad_id)

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, examples, train.micro_batch_size)
        tokens = predict(engine, objective, examples, train.micro_batch_size, chance_of_right)
        judged = [
            [row[place].item() for place in example.places]
            for row, example in zip(tokens, examples, strict=True)
        ]
        found = step_metrics(judged, [r.right for r in examples.records])
        metrics |= {f"eval/{name}": value for name, value in found.items()}
        shown = [
            {"prompt": r.prompt[-1]["content"], "steps": r.steps, "right": r.right, "judged": j}
            for r, j in list(zip(examples.records, judged, strict=True))[:NUM_SAMPLES_SHOWN]
        ]
        return metrics, shown

    return measure


def chance_of_right(model: Model, batch: Batch) -> Tensor:
    """Return the probability that a step which ends at the token is right, [batch, seq]."""
    return torch.softmax(tag_logits(model, batch).float(), dim=-1)[..., 1]


def step_metrics(judged: list[list[float]], right: list[list[bool]]) -> dict[str, float]:
    """Compare the probabilities of being right, per solution and step, with what is."""
    chances = [p for row in judged for p in row]
    truths = [t for row in right for t in row]
    hits = [(p >= 0.5) == t for p, t in zip(chances, truths, strict=True)]
    low, high = wilson(sum(hits), len(hits))
    sure = [max(p, 1 - p) for p in chances]
    first = [
        _first_wrong([p >= 0.5 for p in row]) == _first_wrong(truth)
        for row, truth in zip(judged, right, strict=True)
    ]
    return {
        "accuracy": sum(hits) / len(hits),
        "accuracy_low": low,
        "accuracy_high": high,
        "ece": expected_calibration_error(sure, hits),
        "first_error": sum(first) / len(first),
    }


def _first_wrong(steps: list[bool]) -> int:
    return steps.index(False) if False in steps else -1
