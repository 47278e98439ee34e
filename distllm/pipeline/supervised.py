"""The supervised stages, which differ in data, objective and what is measured; preferences are in `preferences.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distllm import registry
from distllm.data import ngram
from distllm.data.datasets import ChatDataset, PairDataset, text_rows
from distllm.engines.base import Engine
from distllm.engines.collectives import from_main
from distllm.errors import CheckpointError, ConfigError
from distllm.objectives.experts import with_experts
from distllm.objectives.reward import Reward
from distllm.pipeline import preferences
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import (
    Measure,
    heldout_pairs,
    measure_dialogues,
    measure_documents,
    measure_pairs,
)
from distllm.rl.rewards.model import REWARD_HEADS
from distllm.train.evaluate import pair_scores, preference_metrics
from distllm.train.source import SampleSource

NUM_NORMALISED = 512
"""Training pairs whose scores set the mean and spread of a reward model."""


def build(builder: Builder) -> Parts:
    """Build a stage that learns from given samples."""
    own = {"pretrain": _pretrain, "sft": _sft, "reward": _reward}
    return own.get(builder.config.stage.name, preferences.build)(builder)


def _pretrain(builder: Builder) -> Parts:
    config = builder.config
    name = "clm" if config.stage.objective == "auto" else config.stage.objective
    train = text_rows(builder.data, builder.tokenizer, config.train.seq_len, "train")
    objective = registry.get("objective", name)(config.stage, pad_id=builder.pad_id)
    engine = builder.engine("model", builder.model("lm"), trained=True)

    def baselines() -> dict[str, float]:
        if not config.stage.baselines:
            return {}
        heldout = text_rows(builder.data, builder.tokenizer, config.train.seq_len, "heldout")
        documents = [[d[:-1] for d in rows.documents()] for rows in (train, heldout)]
        costs = ngram.baselines(*documents, len(builder.tokenizer), builder.tokenizer.eos_token_id)
        return {f"baseline/{name}": nats for name, nats in costs.items()}

    parts = _parts(builder, engine, objective, train, measure_documents(builder, engine))
    return replace(parts, baselines=lambda: from_main(baselines))


def _sft(builder: Builder) -> Parts:
    config = builder.config
    train = ChatDataset(
        builder.data.dialogues("train"), builder.tokenizer, config.train.seq_len, config.data
    )
    objective = registry.get("objective", "sft")(config.stage, pad_id=builder.pad_id)
    engine = builder.engine("model", builder.model("lm"), trained=True)
    return _parts(builder, engine, objective, train, measure_dialogues(builder, engine))


def _reward(builder: Builder) -> Parts:
    config = builder.config
    if config.stage.head not in REWARD_HEADS:
        raise ConfigError(
            f"stage.head={config.stage.head} is unknown. Known: {', '.join(REWARD_HEADS)}."
        )
    train = PairDataset(
        builder.data.pairs("train"), builder.tokenizer, config.train.seq_len, config.data
    )
    model = builder.model(config.stage.head)
    objective = Reward(config.stage, pad_id=builder.pad_id, join=model.join)
    engine = builder.engine("model", model, trained=True)
    parts = _parts(builder, engine, objective, train, measure_pairs(builder, engine, objective))
    return replace(
        parts,
        finish=partial(_normalise, engine, objective, train, config.train.micro_batch_size),
        baselines=partial(likelihood_baseline, builder, objective),
    )


def _normalise(engine: Engine, objective: Reward, train: PairDataset, batch_size: int) -> None:
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


def _parts(builder: Builder, engine: Engine, objective: Any, train: Any, measure: Measure) -> Parts:
    config = builder.config
    source = SampleSource(
        train,
        engine,
        with_experts(objective, engine.model.options),  # type: ignore[union-attr]
        builder.schedule(),
        config.optim.lr,
        config.train,
        config.run.seed,
    )
    return Parts(
        tokenizer=builder.tokenizer,
        data=builder.data,
        engines={"model": engine},
        trained=["model"],
        source=source,
        evaluate=measure,
        parents={"model": config.model} if config.model else {},
    )
