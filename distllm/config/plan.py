"""What a config leads to, before anything starts: batch arithmetic, parameters, memory, floating-point operations.

One source of truth: whoever needs a derived number asks here. Nothing is written and no model is run.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distllm.config.checks import RECORDS, SUPERVISED, model_options
from distllm.config.footprint import (
    build_meta,
    cache_bytes,
    flops_per_token,
    matmul_parameters,
    parameters_by_part,
    saved_bytes,
    weight_bytes,
)
from distllm.config.schema import Config
from distllm.engines.hardware import available_cores, resolve_device, resolve_precision


@dataclass(frozen=True, slots=True)
class Plan:
    """Derived numbers, by section; each section maps a label to a number or a text."""

    layout: dict[str, Any]
    batch: dict[str, Any]
    parameters: dict[str, int]
    """Of the trained model, per part, with `total` and `multiplied` (what enters the FLOPs)."""
    flops: dict[str, float]
    """Per training token, and per step."""
    memory: dict[str, int]
    """Bytes per process; `total` is a lower estimate of the peak."""


@dataclass(frozen=True, slots=True)
class Role:
    """One model that a stage holds."""

    name: str
    head: str
    is_trained: bool


def make_plan(config: Config, dp_size: int = 1) -> Plan:
    """Work out the numbers for a checked config."""
    options = model_options(config)
    device = resolve_device(config.hardware.device)
    dtype = resolve_precision(config.train.precision, device)
    roles = roles_of(config)
    models = {role.name: build_meta(options, role.head) for role in roles}
    main = models[roles[0].name]
    seq_len = min(config.train.seq_len, options.max_seq_len)
    batch = _batch(config, dp_size, seq_len)
    full, half = (flops_per_token(main, seq_len, causal_half=half) for half in (False, True))
    parameters = parameters_by_part(main)
    return Plan(
        layout={
            "engine": config.engine.name,
            "device": str(device),
            "processes": dp_size,
            "threads": config.hardware.threads or _threads(),
            "arithmetic": str(dtype).removeprefix("torch."),
            "master weights": "float32",
        },
        batch=batch,
        parameters=parameters
        | {"total": sum(parameters.values()), "multiplied": matmul_parameters(main)},
        flops={
            "per token, full attention": full,
            "per token, causal half": half,
            "per step at most, full attention": full * batch["tokens per step at most"],
        },
        memory=_memory(config, options, models, roles, seq_len, dtype),
    )


def roles_of(config: Config) -> list[Role]:
    """List the models that the stage holds; the first is the one it is about."""
    stage = config.stage
    if stage.name in SUPERVISED:
        return [Role("model", getattr(stage, "head", "lm"), True)]
    roles = [Role("policy", "lm", True)]
    if hasattr(stage, "value_lr"):
        roles.append(Role("value", "value", True))
    if stage.kl_coef > 0 or stage.target_kl > 0:
        roles.append(Role("reference", "lm", False))
    if stage.reward == "model" or (stage.reward == "auto" and stage.reward_model):
        roles.append(Role("reward", "likelihood", False))
    return roles


def _batch(config: Config, dp_size: int, seq_len: int) -> dict[str, Any]:
    train, stage = config.train, config.stage
    unit = {"pretrain": "packed rows", "sft": "dialogues", "reward": "pairs"}.get(
        stage.name, "responses"
    )
    rows = 2 if stage.name == "reward" else 1
    numbers: dict[str, Any] = {
        "unit": unit,
        "global_batch_size": train.global_batch_size,
        "= micro_batch_size": train.micro_batch_size,
        "x grad_accum_steps": train.global_batch_size // (train.micro_batch_size * dp_size),
        "x dp_size": dp_size,
        "steps": train.max_steps,
        f"{unit} in all": train.global_batch_size * train.max_steps,
        "tokens per step at most": train.global_batch_size * rows * seq_len,
        "tokens in all at most": train.global_batch_size * rows * seq_len * train.max_steps,
    }
    if stage.name not in SUPERVISED:
        sampled = stage.rollout_batch_size or train.global_batch_size
        numbers |= {
            "responses per rollout batch": sampled,
            "= prompts": sampled // stage.num_samples,
            "x num_samples": stage.num_samples,
            "updates per rollout batch": stage.num_epochs * (sampled // train.global_batch_size),
        }
    return numbers


def count_epochs(config: Config, tokenizer: Any = None) -> dict[str, Any]:
    """Read the data and tell how often the run goes through it; documents need a tokenizer to be counted.

    Raises:
        UserError: the data cannot be read or is not what the stage needs.
    """
    from distllm.data.datasets import text_rows
    from distllm.data.source import open_source

    source = open_source(config.data, config.run.seed)
    kind = RECORDS.get(config.stage.name, "prompts")
    if kind == "documents":
        if tokenizer is None:
            return {"rows to learn from": "set tokenizer=DIR to count", "epochs": "unknown"}
        number = len(text_rows(source, tokenizer, config.train.seq_len, "train"))
    else:
        number = len(getattr(source, kind)("train"))
    used = config.train.global_batch_size * config.train.max_steps
    if kind == "prompts":
        stage = config.stage
        used //= stage.num_samples * stage.num_epochs
    return {
        f"{'rows' if kind == 'documents' else kind} to learn from": number,
        "epochs": used / number,
    }


def available_bytes() -> int | None:
    """Return the memory of this machine, cut by a container's limit; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def to_json(plan: Plan) -> str:
    """Render the plan for scripts."""
    return json.dumps({name: getattr(plan, name) for name in Plan.__slots__}, indent=2)


def _memory(
    config: Config,
    options: Any,
    models: dict[str, Any],
    roles: list[Role],
    seq_len: int,
    dtype: torch.dtype,
) -> dict[str, int]:
    rows = config.train.micro_batch_size * (2 if config.stage.name == "reward" else 1)
    trained = [models[r.name] for r in roles if r.is_trained]
    memory = {f"weights, {r.name}": weight_bytes(models[r.name]) for r in roles}
    memory["gradients"] = sum(map(weight_bytes, trained))
    memory["optimizer moments"] = 2 * sum(map(weight_bytes, trained))
    packed = config.stage.name == "pretrain"
    held = saved_bytes(options, rows, seq_len, dtype, packed=packed)
    if config.engine.activation_checkpointing == "full":
        block = replace(options, n_layers=1)
        one_block = saved_bytes(block, rows, seq_len, dtype, packed=packed)
        inputs = options.n_layers * rows * seq_len * options.d_model * dtype.itemsize
        held = min(held, one_block + inputs)
    memory["activations of a micro-batch"] = held
    # The loss works on chunks of logits and keeps the gradient of the output matrix in fp32.
    all_logits = rows * seq_len * options.vocab_size * 4
    memory["loss"] = min(LOGITS_CHUNK_BYTES, all_logits) + 4 * options.vocab_size * options.d_model
    if config.stage.name not in SUPERVISED:
        sampled = config.stage.rollout_batch_size or config.train.global_batch_size
        length = min(options.max_seq_len, seq_len + config.generation.max_new_tokens)
        memory["key/value cache"] = cache_bytes(models["policy"], sampled, length, dtype)
    memory["total"] = sum(memory.values())
    memory["not held: full logits"] = all_logits
    return memory


LOGITS_CHUNK_BYTES = 3 * 16 * 2**20
"""A chunk of logits in `layers/cross_entropy.py`, its copy in fp32, and slack for the softmax."""


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or available_cores()
