"""What a config leads to, before anything starts: batch arithmetic, parameters, operations, memory, step time.

One source of truth: whoever needs a derived number asks here. Nothing is written and no model is run. The formulas are
in `forecast.py` and the files it names.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.arch.adapter import WHOLE_HEADS, matrix_shapes, target_layers
from distllm.config.advice import cheapest_fit, layout_problems
from distllm.config.checks import model_options
from distllm.config.footprint import build_meta, parameters_by_part
from distllm.config.forecast import Forecast, Models, forecast, models_of, target_of
from distllm.config.layout import layout_of
from distllm.config.overrides import raise_all
from distllm.config.schema import Config, supervised_stages
from distllm.config.step_time import StepTime
from distllm.engines.hardware import available_cores


@dataclass(frozen=True, slots=True)
class Plan:
    """Derived numbers, by section; each section maps a label to a number or a text."""

    layout: dict[str, Any]
    batch: dict[str, Any]
    parameters: dict[str, int]
    """Of the trained model, per part, with `total`, `trained` and `multiplied` (what enters the FLOPs)."""
    flops: dict[str, float]
    """Per training token, and per step."""
    memory: dict[str, int]
    """Bytes per process: each class at its own worst moment, `peak` is the most at one moment."""
    communication: list[dict[str, Any]]
    """What one process receives per step, one entry per kind of transfer; empty where nothing is sent or known."""
    time: dict[str, float]
    """Seconds per step, by cause, and what follows; empty on a machine whose rates are not known."""
    fit: dict[str, Any]
    """Whether the peak fits, and if not, what to change."""


def make_plan(config: Config, dp_size: int | None = None) -> Plan:
    """Work out the numbers for a checked config.

    Args:
        config: the run.
        dp_size: processes that see different data; None takes the layout's.

    Raises:
        UserError: the layout is impossible.
    """
    raise_all(layout_problems(config))
    options = model_options(config)
    models = models_of(config)
    predicted = forecast(config, models)
    main = build_meta(options, models.roles[0].head)
    parameters, trained = _parameters(config, main)
    seq_len = predicted.work.seq
    batch = _batch(config, dp_size or predicted.layout.dp, seq_len)
    full, half = (models.flops.per_token(seq_len, causal_half=half) for half in (False, True))
    return Plan(
        layout=_layout(config, predicted),
        batch=batch,
        parameters=parameters
        | {
            "total": sum(parameters.values()),
            "trained": trained,
            "multiplied": models.flops.multiplied,
        },
        flops={
            "per token, full attention": full,
            "per token, causal half": half,
            "per step at most, full attention": full * batch["tokens per step at most"],
        },
        memory=_memory(predicted),
        communication=_communication(predicted),
        time=_time(config, models, predicted),
        fit=_fit(config, models, predicted),
    )


def _parameters(config: Config, model: Any) -> tuple[dict[str, int], int]:
    """Count the parameters per part, those of an adapter among them, and the ones that are trained."""
    parameters = parameters_by_part(model)
    if config.adapter.name == "none":
        return parameters, sum(parameters.values())
    layers = target_layers(model, config.adapter).values()
    parameters["adapter"] = sum(
        math.prod(shape) for m in layers for shape in matrix_shapes(m, config.adapter.rank)
    )
    head = parameters.get("head", 0) if model.head_name in WHOLE_HEADS else 0
    return parameters, parameters["adapter"] + head


def planned_dp_size(config: Config) -> int:
    """Return how many processes of the planned machine see different data."""
    return layout_of(config.engine, target_of(config).world_size).dp


def _layout(config: Config, predicted: Forecast) -> dict[str, Any]:
    layout, target = predicted.layout, predicted.target
    rows: dict[str, Any] = {"engine": config.engine.name}
    if target.cluster is None:
        rows["device"] = "cpu" if target.on_cpu else "cuda"
        rows["threads"] = config.hardware.threads or _threads()
    else:
        cluster = target.cluster
        rows["hardware"] = f"{cluster.num_gpus} x {cluster.gpu} in {cluster.num_nodes} machines"
    rows |= {
        "processes": layout.world_size,
        "= data parallel": layout.dp,
        "  of which share one copy": layout.dp_shard,
        "x tensor parallel": layout.tp,
        "ZeRO stage": layout.zero_stage,
        "recomputation": predicted.work.checkpointing,
        "arithmetic": str(target.dtype).removeprefix("torch."),
        "master weights": "float32",
    }
    return rows


def _batch(config: Config, dp_size: int, seq_len: int) -> dict[str, Any]:
    train, stage = config.train, config.stage
    unit = supervised_stages().get(stage.name, "responses")
    unit = {"documents": "packed rows", "unpaired": "answers"}.get(unit, unit)
    rows = 2 if unit == "pairs" else 1
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
    if stage.name not in supervised_stages():
        sampled = stage.rollout_batch_size or train.global_batch_size
        numbers |= {
            "responses per rollout batch": sampled,
            "= prompts": sampled // stage.num_samples,
            "x num_samples": stage.num_samples,
            "updates per rollout batch": stage.num_epochs * (sampled // train.global_batch_size),
        }
    return numbers


def _memory(predicted: Forecast) -> dict[str, int]:
    parts = list(predicted.memory.values())
    memory = {f"weights, {role}": m.weights for role, m in predicted.memory.items()}
    memory |= {
        "gradients": sum(m.gradients for m in parts),
        "optimizer": sum(m.optimizer for m in parts),
        "activations": max(m.activations for m in parts),
        "logits": max(m.logits for m in parts),
        "communication buffers": max(m.communication for m in parts),
    }
    if predicted.cache_bytes:
        memory["key/value cache"] = predicted.cache_bytes
    if any(m.host for m in parts):
        memory["in host memory instead"] = sum(m.host for m in parts)
    memory["peak"] = predicted.peak
    return memory


def _communication(predicted: Forecast) -> list[dict[str, Any]]:
    time = predicted.time
    return [
        {
            "what": sent.transfer.name,
            "collective": sent.transfer.kind,
            "processes": sent.transfer.group,
            "phase": sent.transfer.phase,
            "bytes": sent.transfer.received,
            "seconds": sent.seconds,
            "exposed_s": sent.exposed_s,
        }
        for sent in (time.sent if time else ())
        if sent.transfer.group > 1
    ]


def _time(config: Config, models: Models, predicted: Forecast) -> dict[str, float]:
    time, cluster = predicted.time, predicted.target.cluster
    if time is None or cluster is None:
        return {}
    seconds, gpus = time.step_s, predicted.layout.world_size
    rate = predicted.tokens_per_step / seconds / gpus
    is_bf16 = predicted.work.element == 2
    peak = 1e12 * (cluster.peak_bf16_tflops if is_bf16 else cluster.peak_fp32_tflops)
    full, half = (
        models.flops.per_token(predicted.work.seq, causal_half=half) for half in (False, True)
    )
    return _causes(time) | {
        "step": seconds,
        "tokens per second": rate * gpus,
        "tokens per second and GPU": rate,
        "MFU, full attention": rate * full / peak,
        "MFU, causal half": rate * half / peak,
        "hours in all": config.train.max_steps * seconds / 3600,
    }


def _causes(time: StepTime) -> dict[str, float]:
    return {
        "matrix products": time.matmul_s,
        "attention": time.attention_s,
        "elementwise work and loss": time.traffic_s,
        "optimizer": time.optimizer_s,
        "communication, exposed": time.exposed_s,
        "communication, hidden": time.communication_s - time.exposed_s,
    }


def _fit(config: Config, models: Models, predicted: Forecast) -> dict[str, Any]:
    worst = max(predicted.memory.values(), key=lambda m: m.peak).worst
    available = predicted.available or available_bytes()
    found: dict[str, Any] = {
        "peak at": worst,
        "available": available,
        "fits": available is None or predicted.peak <= available,
    }
    if not found["fits"] and predicted.target.cluster is not None:
        advice = cheapest_fit(config, models, predicted)
        found["change"] = None if advice is None else advice.text
        if advice is not None and advice.forecast.time is not None:
            found |= {
                "then peak": advice.forecast.peak,
                "then step": advice.forecast.time.step_s,
                "then slower by": advice.slowdown - 1,
            }
    return found


def count_epochs(config: Config, tokenizer: Any = None) -> dict[str, Any]:
    """Read the data and tell how often the run goes through it; documents need a tokenizer to be counted.

    Raises:
        UserError: the data cannot be read or is not what the stage needs.
    """
    from distllm.data.datasets import text_rows
    from distllm.data.source import open_source

    source = open_source(config.data, config.run.seed)
    kind = supervised_stages().get(config.stage.name, "prompts")
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


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or available_cores()
