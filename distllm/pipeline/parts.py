"""What all stages share that learn from given samples."""

from __future__ import annotations

from typing import Any

from distllm.engines.base import Engine
from distllm.objectives.experts import with_experts
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import Measure
from distllm.train.source import SampleSource


def supervised_parts(
    builder: Builder, engine: Engine, objective: Any, train: Any, measure: Measure
) -> Parts:
    """Put a data set, an objective and a model together; the model stands under the role `model`."""
    config = builder.config
    source = SampleSource(
        train,
        engine,
        with_experts(objective, engine.model.options),  # type: ignore[union-attr]
        builder.schedule(),
        builder.peak_lr,
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
