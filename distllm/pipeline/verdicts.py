"""The stages `classify` and `tag`: classes of texts, tags of words, and what is measured of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distllm.arch.io import read_config
from distllm.data.labelled import LabelledDataset, TaggedDataset, TaggedExample, label_names
from distllm.engines.base import Engine
from distllm.errors import DataError
from distllm.objectives.classify import Classify, ClassifyOptions, class_logits
from distllm.objectives.tag import Tag, TagOptions, tag_logits
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import NUM_SAMPLES_SHOWN, Measure
from distllm.pipeline.parts import supervised_parts
from distllm.train.evaluate import evaluate_loss
from distllm.train.intervals import wilson
from distllm.train.verdicts import entity_metrics, macro_f1
from distllm.types import Batch, Model

NO_ENTITY = "O"
"""The tag of a word that is no part of an entity, and of one that no token shows."""


def build_classify(builder: Builder) -> Parts:
    """Build a stage that learns classes of texts."""
    records = builder.data.labelled("train")
    names = known_labels(builder, (r.label for r in records))
    model = builder.model("classify", num_labels=len(names))
    model.label_names = names
    config = builder.config
    train = LabelledDataset(
        records, builder.tokenizer, config.train.seq_len, config.data, names=names
    )
    objective = Classify(config.stage, builder.pad_id, model.join)
    engine = builder.engine("model", model, trained=True)
    measure = measure_labelled(builder, engine, names)
    return supervised_parts(builder, engine, objective, train, measure)


def build_tag(builder: Builder) -> Parts:
    """Build a stage that learns tags of words."""
    config = builder.config
    records = builder.data.tagged("train")
    names = known_labels(builder, (tag for r in records for tag in r.tags))
    model = builder.model("tag", num_labels=len(names))
    model.label_names = names
    train = TaggedDataset(
        records, builder.tokenizer, config.train.seq_len, config.data, names=names
    )
    engine = builder.engine("model", model, trained=True)
    measure = measure_tagged(builder, engine, names)
    return supervised_parts(builder, engine, Tag(config.stage, builder.pad_id), train, measure)


def known_labels(builder: Builder, labels: Iterable[Any]) -> list[str]:
    """Return the names of the labels: the model's own if it has some, else those that occur in the data.

    Raises:
        DataError: the data has labels that the model does not know.
    """
    found = label_names(labels)
    own = saved_labels(builder)
    if not own:
        return found
    unknown = sorted(set(found) - set(own))
    if unknown:
        raise DataError(
            f"model={builder.config.model} was trained to tell {', '.join(own)} apart; the data also has "
            f"{', '.join(unknown)}."
        )
    return own


def saved_labels(builder: Builder) -> list[str]:
    """Return the label names of the model to start from; none if it has no head for labels."""
    if builder.config.model is None:
        return []
    config = read_config(Path(builder.config.model))
    if config.get("distllm_head") not in ("classify", "tag"):
        return []
    named = config.get("id2label") or {}
    return [named[str(i)] for i in range(len(named))]


def measure_labelled(builder: Builder, engine: Engine, names: Sequence[str]) -> Measure:
    """Accuracy with its interval, F1 averaged over classes, and the loss."""
    train = builder.config.train
    records = builder.data.labelled("heldout")[: train.num_eval_samples]
    examples = LabelledDataset(
        records, builder.tokenizer, train.seq_len, builder.config.data, names=names
    )
    model: Any = engine.model
    objective = Classify(ClassifyOptions(), builder.pad_id, model.join)

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, examples, train.micro_batch_size)
        found = [
            int(p) for p in predict(engine, objective, examples, train.micro_batch_size, _class)
        ]
        right = [examples[i].label for i in range(len(examples))]
        hits = sum(p == r for p, r in zip(found, right, strict=True))
        low, high = wilson(hits, len(right))
        metrics |= {
            "eval/accuracy": hits / len(right),
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/macro_f1": macro_f1(found, right, len(names)),
        }
        shown = [
            {"texts": r.texts, "label": names[a], "predicted": names[b]}
            for r, a, b in list(zip(examples.records, right, found, strict=True))[
                :NUM_SAMPLES_SHOWN
            ]
        ]
        return metrics, shown

    return measure


def measure_tagged(builder: Builder, engine: Engine, names: Sequence[str]) -> Measure:
    """F1 of whole entities, where the tags spell entities out, the accuracy of single tags, and the loss."""
    train = builder.config.train
    records = builder.data.tagged("heldout")[: train.num_eval_samples]
    examples = TaggedDataset(
        records, builder.tokenizer, train.seq_len, builder.config.data, names=names
    )
    objective = Tag(TagOptions(), builder.pad_id)
    has_entities = any(name.startswith("B-") for name in names)

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, examples, train.micro_batch_size)
        tokens = predict(engine, objective, examples, train.micro_batch_size, _tags)
        found = [_word_tags(examples[i], tags.tolist(), names) for i, tags in enumerate(tokens)]
        right = [[names[int(t)] for t in examples[i].tags] for i in range(len(examples))]
        hits = sum(
            p == r for f, g in zip(found, right, strict=True) for p, r in zip(f, g, strict=True)
        )
        metrics["eval/tag_accuracy"] = hits / sum(map(len, right))
        if has_entities:
            metrics |= {f"eval/{k}": v for k, v in entity_metrics(found, right).items()}
        shown = [
            {"tokens": r.tokens, "tags": a, "predicted": b}
            for r, a, b in list(zip(examples.records, right, found, strict=True))[
                :NUM_SAMPLES_SHOWN
            ]
        ]
        return metrics, shown

    return measure


def predict(
    engine: Engine,
    objective: Any,
    examples: Any,
    batch_size: int,
    function: Callable[[Model, Batch], Tensor],
) -> list[Tensor]:
    """Return what `function` says of each example. All ranks take part, and all get the same."""
    found: dict[int, Tensor] = {}
    for numbers, counts in engine.share(len(examples), batch_size):
        batch = objective.collate([examples[i] for i in numbers]).to(engine.device)
        verdicts = engine.infer(function, batch).cpu()
        found |= zip(numbers, verdicts, strict=True) if counts else {}
    return engine.gather(found, len(examples))


def _class(model: Model, batch: Batch) -> Tensor:
    return class_logits(model, batch).argmax(dim=-1)


def _tags(model: Model, batch: Batch) -> Tensor:
    return tag_logits(model, batch).argmax(dim=-1)


def _word_tags(example: TaggedExample, tags: Sequence[int], names: Sequence[str]) -> list[str]:
    fallback = NO_ENTITY if NO_ENTITY in names else names[0]
    return [names[tags[place]] if place >= 0 else fallback for place in example.places]
