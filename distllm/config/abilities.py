"""Which stages an architecture can be trained in: what it says of itself (`arch/abilities.py`) against what is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distllm import registry
from distllm.arch.abilities import CAUSAL, Abilities
from distllm.arch.io import read_options
from distllm.config.schema import Config
from distllm.errors import ConfigError
from distllm.objectives.options import READ_BY, PretrainOptions

_WRITING = ("dpo", "kto", "orpo", "simpo")
"""Stages that need the probability of a text."""


def arch_name(config: Config) -> str:
    """Return the architecture of the model that is trained."""
    return _model_options(config).name


def abilities_of(config: Config) -> Abilities:
    """Return what the architecture of the run's model can be trained for."""
    options = _model_options(config)
    cls = registry.get("arch", options.name)
    by_kind = getattr(cls, "abilities_by_kind", {})
    return by_kind.get(getattr(options, "kind", ""), getattr(cls, "abilities", CAUSAL))


def _model_options(config: Config) -> Any:
    """Return the shape of the model that is trained: the saved one's where the run starts from one."""
    if config.model is None:
        return config.arch
    return read_options(Path(config.model), config.arch.name)


def resolve_objective(config: Config) -> str:
    """Return the pretraining objective.

    Raises:
        ConfigError: the architecture cannot learn the one that is set.
    """
    able, wanted = abilities_of(config).objectives, getattr(config.stage, "objective", "auto")
    if wanted == "auto":
        return able[0]
    if wanted not in able:
        raise ConfigError(
            f"stage.objective={wanted} is nothing that arch={arch_name(config)} can learn. Set stage.objective to "
            f"{' or '.join(able)}, or to auto."
        )
    return wanted


def packs_dialogues(config: Config) -> bool:
    """Say whether several dialogues are laid into one row, where the objective is that of `stage=sft`."""
    if config.stage.name == "sft" and config.stage.pack is not None:
        return config.stage.pack
    return abilities_of(config).packs and not _balances_rows(config)


def _balances_rows(config: Config) -> bool:
    """Say whether experts are balanced, which is counted by row."""
    options = _model_options(config)
    coefs = (getattr(options, name, 0) for name in ("balance_coef", "router_z_coef"))
    return getattr(options, "num_experts", 0) > 0 and any(coefs)


def ability_problems(config: Config) -> list[str]:
    """Check the stage against the architecture."""
    able, stage, name = abilities_of(config), config.stage, arch_name(config)
    try:
        objective = resolve_objective(config)
    except ConfigError as error:
        return [str(error)]
    problems = _tracing_problems(config, able)
    if problems:
        return problems
    if isinstance(stage, PretrainOptions):
        return _objective_problems(stage, objective)
    if stage.name == "sft" and not able.sft:
        return [
            f"stage=sft: arch={name} does not write text, so it cannot imitate answers. Set stage=classify or stage=tag, "
            "or choose a decoder."
        ]
    if stage.name == "sft" and stage.pack and _balances_rows(config):
        return [
            f"stage.pack=true lays several dialogues into one row, and the balance of the experts of arch={name} is taken "
            "by row, so the loss would change. Set stage.pack=false, or arch.balance_coef=0 arch.router_z_coef=0."
        ]
    if stage.name in _WRITING and not able.generates:
        return [
            f"stage={stage.name} compares the probabilities of answers, and arch={name} does not write text. Set "
            "stage=reward, or choose a decoder."
        ]
    if getattr(stage, "head", "") == "likelihood" and not able.generates:
        return [
            f"stage.head=likelihood scores an answer by its probability, and arch={name} does not write text. Set "
            "stage.head=last."
        ]
    if stage.name in ("tag", "process") and able.two_sequences:
        return [
            f"stage={stage.name} labels tokens of the input, and the states of arch={name} stand at those of a target. Choose "
            "an encoder (arch=bert_tiny) or a decoder."
        ]
    if getattr(stage, "reward", "") == "model" and not able.generates:
        return [
            f"stage.reward=model scores sampled token ids, and arch={name} answers with labels. Set "
            "stage.reward=classifier, which reads their names."
        ]
    return []


def _tracing_problems(config: Config, able: Abilities) -> list[str]:
    """Find settings of the engine that must see the operations inside of a block."""
    asked = {
        "engine.compile=true": (config.engine.compile, "engine.compile=false"),
        "engine.activation_checkpointing=selective": (
            config.engine.activation_checkpointing == "selective",
            "engine.activation_checkpointing=full or none",
        ),
    }
    return [
        f"{setting} follows the operations inside of a block, and those of arch={arch_name(config)} are one call of torch's "
        f"own LSTM. Set {instead}."
        for setting, (is_set, instead) in asked.items()
        if is_set and not able.traceable
    ]


def _objective_problems(stage: PretrainOptions, objective: str) -> list[str]:
    """Find settings that another objective reads, and shares that are more than the whole."""
    defaults, problems = PretrainOptions(), []
    for key, readers in READ_BY.items():
        value, default = getattr(stage, key), getattr(defaults, key)
        if value != default and objective not in readers:
            problems.append(
                f"stage.{key}={value} is for {' and '.join(readers)}, and stage.objective={objective} does not read it. "
                f"Leave it out (default: {default})."
            )
    if stage.sampled_words and stage.z_loss:
        problems.append(
            f"stage.sampled_words={stage.sampled_words} leaves most words out of the softmax, whose whole sum "
            f"stage.z_loss={stage.z_loss:g} weighs. Set stage.sampled_words=0 or stage.z_loss=0."
        )
    for objective_of, first, second, what in _SHARES:
        total = getattr(stage, first) + getattr(stage, second)
        if objective == objective_of and total > 1 + 1e-9:
            problems.append(
                f"stage.{first}={getattr(stage, first)} + stage.{second}={getattr(stage, second)} = {total:g}, and both "
                f"are shares of {what}: at most 1 together. Set stage.{second}={1 - getattr(stage, first):g} or less."
            )
    return problems


_SHARES = (
    ("mlm", "mask_token_share", "random_token_share", "the hidden tokens"),
    ("blank", "sentence_share", "document_share", "the texts"),
)
"""(objective, two settings, what they divide among themselves)."""


def records_of(config: Config, kind: str) -> str:
    """Return the kind of record that a stage of the run's model learns from, where RL as such needs prompts."""
    if kind != "prompts" or (config.model and not Path(config.model).is_dir()):
        return kind
    return kind if abilities_of(config).generates else "labelled"
