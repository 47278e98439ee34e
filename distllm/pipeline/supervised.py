"""The supervised stages, which differ in data, objective and what is measured; preferences are in `preferences.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distllm.config.abilities import abilities_of
from distllm.data.datasets import ChatDataset
from distllm.engines.base import Engine
from distllm.errors import CheckpointError, ConfigError
from distllm.objectives.reward import Reward
from distllm.pipeline import multi_reward, preferences, pretraining, process, verdicts
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import (
    heldout_pairs,
    measure_dialogues,
    measure_pairs,
    pair_dataset,
    sft_objective,
)
from distllm.pipeline.parts import supervised_parts
from distllm.rl.rewards.model import REWARD_HEADS
from distllm.train.evaluate import pair_scores, preference_metrics

NUM_NORMALISED = 512
"""Training pairs whose scores set the mean and spread of a reward model."""


def build(builder: Builder) -> Parts:
    """Build a stage that learns from given samples."""
    own = {
        "pretrain": pretraining.build,
        "sft": _sft,
        "reward": _reward,
        "multi_reward": multi_reward.build,
        "classify": verdicts.build_classify,
        "tag": verdicts.build_tag,
        "process": process.build,
    }
    return own.get(builder.config.stage.name, preferences.build)(builder)


def _sft(builder: Builder) -> Parts:
    config = builder.config
    train = ChatDataset(
        builder.data.dialogues("train"), builder.tokenizer, config.train.seq_len, config.data
    )
    model = builder.model("lm")
    objective = sft_objective(builder, model)
    engine = builder.engine("model", model, trained=True)
    return supervised_parts(builder, engine, objective, train, measure_dialogues(builder, engine))


def _reward(builder: Builder) -> Parts:
    config = builder.config
    if config.stage.head not in REWARD_HEADS:
        raise ConfigError(
            f"stage.head={config.stage.head} is unknown. Known: {', '.join(REWARD_HEADS)}."
        )
    train = pair_dataset(builder, builder.data.pairs("train"))
    model = builder.model(config.stage.head)
    objective = Reward(config.stage, pad_id=builder.pad_id, join=model.join)
    engine = builder.engine("model", model, trained=True)
    parts = supervised_parts(
        builder, engine, objective, train, measure_pairs(builder, engine, objective)
    )
    finish = partial(_normalise, engine, objective, train, config.train.micro_batch_size)
    if not abilities_of(config).generates:
        return replace(parts, finish=finish)
    return replace(parts, finish=finish, baselines=partial(likelihood_baseline, builder, objective))


def _normalise(engine: Engine, objective: Reward, train: Any, batch_size: int) -> None:
    """Shift and scale the scores to mean 0 and deviation 1 over training answers, right and wrong."""
    count = min(len(train), NUM_NORMALISED)
    part = [train[i] for i in range(count)]
    head: Any = engine.model.head
    both = torch.cat(pair_scores(engine, objective, part, batch_size))
    both = both * head.reward_std.cpu() + head.reward_mean.cpu()  # they may have been set before
    head.reward_mean.copy_(both.mean())
    head.reward_std.copy_(both.std())


def likelihood_baseline(builder: Builder, objective: Reward) -> dict[str, float]:
    """Judge the held-out pairs by the log-likelihood of the model that training starts from, if it has one."""
    try:
        model = builder.model("likelihood", dropout=False)
    except CheckpointError:
        return {}  # it has been trained to judge before, and is no language model any more
    engine = builder.engine("baseline", model, trained=False)
    _, pairs = heldout_pairs(builder)
    size = builder.config.train.micro_batch_size
    chosen, rejected = pair_scores(engine, objective, pairs, size)
    return {
        k.replace("eval/", "baseline/likelihood_"): v
        for k, v in preference_metrics(chosen - rejected, pairs).items()
        if k.startswith("eval/accuracy")
    }
