"""`distllm evaluate`: measure a saved model on held-out data, without a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distllm.arch.io import load_model
from distllm.config.schema import Config
from distllm.engines.hardware import resolve_device, tune_cpu
from distllm.engines.processes import phase, processes
from distllm.errors import ConfigError
from distllm.objectives.reward import Reward, RewardOptions
from distllm.pipeline.agreement import sampling_agreement
from distllm.pipeline.build import Builder
from distllm.pipeline.judge import judge
from distllm.pipeline.measure import heldout_pairs, measure_dialogues, measure_pairs
from distllm.pipeline.multi_reward import measure_objectives
from distllm.pipeline.pretraining import measure_texts
from distllm.pipeline.process import measure_steps
from distllm.pipeline.verdicts import measure_labelled, measure_tagged
from distllm.rl.rewards.model import REWARD_HEADS


def evaluate(config: Config) -> dict[str, Any]:
    """Measure `config.model` on the held-out split of `config.data`.

    A reward model is measured on pairs, with its calibration and what its scores depend on; a language model on documents if the data has them, else on dialogues.

    Returns:
        `model`, `data`, `num_parameters`, and the metrics.

    Raises:
        ConfigError: the data has nothing that this kind of model can be measured on.
    """
    with processes(config.engine, resolve_device(config.hardware.device)), phase("evaluation"):
        return _evaluate(config)


def _evaluate(config: Config) -> dict[str, Any]:
    assert config.model is not None
    tune_cpu(config.hardware)
    builder = Builder(config, Path(config.model))
    model, _ = load_model(config.model, arch=config.arch.name)
    builder.check_fits(model)
    engine = builder.engine("model", model, trained=False)
    serves = builder.data.serves
    more: dict[str, Any] = {}
    if model.head_name in REWARD_HEADS:
        objective = Reward(RewardOptions(head=model.head_name), builder.pad_id, model.join)
        measure = measure_pairs(builder, engine, objective)
        pairs = heldout_pairs(builder)[1]
        more = judge(engine, objective, pairs, config.train.micro_batch_size)
    elif model.head_name == "lm" and "documents" in serves:
        measure = measure_texts(builder, engine)
    elif model.head_name == "lm" and "dialogues" in serves:
        measure = measure_dialogues(builder, engine)
        more = sampling_agreement(builder, engine) if "prompts" in serves else {}
    elif model.head_name == "classify" and "labelled" in serves:
        measure = measure_labelled(builder, engine, model.label_names)
    elif model.head_name == "classify" and "compared" in serves:
        measure = measure_objectives(builder, engine, model.label_names)
    elif model.head_name == "tag" and "stepwise" in serves:
        measure = measure_steps(builder, engine)
    elif model.head_name == "tag" and "tagged" in serves:
        measure = measure_tagged(builder, engine, model.label_names)
    else:
        raise ConfigError(
            f"data={config.data.name} serves {', '.join(serves)}; a model with the head {model.head_name} cannot be "
            "measured on these. A reward model needs pairs, a language model documents or dialogues, a classifier labelled texts, a "
            "judge by several objectives compared pairs, a "
            "tagger tagged words, a judge of steps solutions in steps."
        )
    metrics, _ = measure()
    metrics |= more
    return {
        "model": config.model,
        "data": config.data.name,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        **{k.removeprefix("eval/"): v for k, v in metrics.items()},
    }
