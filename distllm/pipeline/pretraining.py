"""Pretraining: raw text to rows, by the objective of the architecture or the one that is set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from distllm import registry
from distllm.config.abilities import resolve_objective
from distllm.data import ngram
from distllm.data.datasets import text_rows
from distllm.data.fim import encode_with_gaps
from distllm.data.mixture import Joined
from distllm.data.shards import ShardsSource
from distllm.data.tokenizer import encode_texts
from distllm.data.vocabulary import Vocabulary
from distllm.engines.base import Engine
from distllm.engines.collectives import from_main
from distllm.errors import DataError
from distllm.objectives.options import PretrainOptions
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import Measure, continuations
from distllm.pipeline.parts import supervised_parts
from distllm.train.evaluate import evaluate_loss


def build(builder: Builder) -> Parts:
    """Build a pretraining stage."""
    config = builder.config
    model = builder.model("lm")
    objective, train = _learn(builder, model, "train")
    engine = builder.engine("model", model, trained=True)
    parts = supervised_parts(builder, engine, objective, train, measure_texts(builder, engine))
    if not config.stage.baselines:
        return parts
    return replace(parts, baselines=lambda: from_main(partial(_baselines, builder)))


def measure_texts(builder: Builder, engine: Engine) -> Measure:
    """Nats per predicted token of held-out text; for causal models bits per byte and some continuations too."""
    train = builder.config.train
    objective, rows = _learn(builder, engine.model, "heldout")
    shown = [rows[i] for i in range(min(len(rows), train.num_eval_samples))]
    is_causal = resolve_objective(builder.config) == "clm"
    openings = [ids[:12].tolist() for ids in rows.documents()[:4]] if is_causal else []

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, shown, train.micro_batch_size)
        if not is_causal:
            return metrics, []
        metrics["eval/bits_per_byte"] = rows.bits_per_byte(metrics["eval/loss"])
        return metrics, continuations(builder, engine, openings)

    return measure


def _learn(builder: Builder, model: Any, split: str) -> tuple[Any, Any]:
    """Return (objective, rows) of one side of the data."""
    config, tokenizer = builder.config, builder.tokenizer
    name = resolve_objective(config)
    cls, seq_len = registry.get("objective", name), config.train.seq_len
    if name == "clm":
        options = config.stage if split == "train" else _without_extras(config.stage)
        rate = getattr(options, "fim_rate", 0.0)
        encode = encode_texts
        if rate:
            encode = partial(
                encode_with_gaps, rate=rate, spm_rate=options.fim_spm_rate, seed=config.run.seed
            )
        return cls(options, pad_id=builder.pad_id), text_rows(
            builder.data, tokenizer, seq_len, split, encode
        )
    options = config.stage if config.stage.name == "pretrain" else PretrainOptions()
    objective = cls(
        options,
        Vocabulary(tokenizer),
        model,
        seq_len,
        seed=config.run.seed,
        evaluating=split == "heldout",
    )
    if isinstance(builder.data, ShardsSource):
        encoded = builder.data.encoded(tokenizer, split)
        rows = [(objective.dataset(ids), weight) for ids, weight in encoded]
        return objective, Joined(rows) if len(rows) > 1 else rows[0][0]
    documents = builder.data.documents(split)
    if not documents:
        raise DataError(f"data={config.data.name} holds no document in split {split}.")

    def lay_out(part: Sequence[Any]) -> Any:
        return objective.dataset(encode_texts(tokenizer, [d.text for d in part]))

    shares, at, parts = getattr(documents, "shares", ()), 0, []
    for share in shares:
        parts.append((lay_out(documents[at : at + share.size]), share.weight))
        at += share.size
    return objective, Joined(parts) if parts else lay_out(documents)


def _without_extras(stage: Any) -> Any:
    """Return the settings that held-out text is measured with: as it is, and without what only helps training."""
    extras = ("z_loss", "fim_rate", "sampled_words")
    off = {name: 0 for name in extras if getattr(stage, name, 0)}
    return replace(stage, **off) if off else stage


def _baselines(builder: Builder) -> dict[str, float]:
    """Measure n-gram models on the same tokens."""
    seq_len, tokenizer = builder.config.train.seq_len, builder.tokenizer
    rows = [text_rows(builder.data, tokenizer, seq_len, split) for split in ("train", "heldout")]
    train, heldout = ([d[:-1] for d in r.documents()] for r in rows)
    order = builder.config.stage.ngram_order
    costs = ngram.baselines(train, heldout, len(tokenizer), tokenizer.eos_token_id, order)
    return {f"baseline/{name}": nats for name, nats in costs.items()}
