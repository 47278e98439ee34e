"""DeepSpeed's JSON, made from our settings; a user's own JSON may add to it, but not contradict it.

Plain dictionaries: nothing here imports the library. The engine is in `deepspeed.py`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distllm.engines.mesh import dp_size
from distllm.engines.options import BatchSizes, EngineOptions
from distllm.types import free

ELEMENTS_PER_MIB = 2**20 // 4
"""Gradients travel as fp32."""

FOREIGN = {
    "scheduler": "distllm has schedule=... of its own",
    "elasticity": "the number of processes is the launcher's matter",
    "hybrid_engine": "sampling is distllm's own",
    "tensor_parallel": "use engine=fsdp with engine.mesh.tp_size",
    "sequence_parallel_size": "use engine=fsdp with engine.mesh.tp_size",
    "pipeline": "it needs a model made of pipeline stages",
    "curriculum_learning": "the order of the data is distllm's own",
    "data_efficiency": "the order of the data is distllm's own",
    "compression_training": "it changes the model behind distllm's back",
    "autotuning": "it starts other runs",
    "expert_parallel": "it replaces parts of the model",
}
"""Sections that change what only one side may decide, and why."""


SECTIONS = (
    "bf16",
    "bfloat16",
    "data_types",
    "fp16",
    "optimizer",
    "optimizer.params",
    "torch_autocast",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
)
"""Keys that hold further keys."""


@dataclass(kw_only=True, slots=True)
class DeepSpeedOptions(EngineOptions):
    """ZeRO: what data-parallel processes hold in common is cut into parts (Rajbhandari et al. 2020, arXiv 1910.02054)."""

    name: str = free("deepspeed")
    zero_stage: int = free(2)
    """What is cut: 0 nothing, 1 the moments and master weights, 2 the gradients too, 3 the weights too."""
    offload_optimizer: bool = free(False)
    """Keep moments and master weights in host memory, and update there; slower, and the GPU holds less."""
    offload_param: bool = free(False)
    """Keep the parts of the weights in host memory between uses (stage 3)."""
    bucket_mib: int | None = free(None)
    """Gradients and weights travel in buckets of this many MiB; None leaves it to `engine.config`, or 200."""
    config: str | None = free(None)
    """A DeepSpeed JSON file with further settings of the library."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An entry of the JSON that follows from a setting of ours."""

    value: Any
    ours: str
    """The setting, as it is written."""


def library_settings(
    options: DeepSpeedOptions,
    optim: Any,
    batch: BatchSizes,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], list[str]]:
    """Return (JSON for the library, what is wrong with it).

    Args:
        options: of the engine.
        optim: of the optimizer; None for a frozen model.
        batch: sequences in a step.
        device: where the model runs.
        dtype: of the heavy arithmetic.
    """
    settings = derived(options, optim, batch, dp_size(options), dtype == torch.bfloat16)
    found, problems = merged(settings, defaults(options, device.type == "cuda"), options.config)
    return found, _option_problems(options) + problems


def derived(
    options: DeepSpeedOptions, optim: Any, batch: BatchSizes, dp_size: int, bf16: bool
) -> dict[str, Setting]:
    """Return dotted JSON key -> what our settings make of it.

    Args:
        options: of the engine.
        optim: of the optimizer; None for a frozen model.
        batch: sequences in a step.
        dp_size: processes that see different data.
        bf16: whether the heavy arithmetic is bf16.
    """
    micro = batch.per_micro_step
    steps = batch.per_step // (micro * dp_size)
    arithmetic = f"train.global_batch_size={batch.per_step}, train.micro_batch_size={micro} and {dp_size} processes"
    precision = f"train.precision={'bf16' if bf16 else 'fp32'}"
    stage = f"engine.zero_stage={options.zero_stage}"
    found = {
        "train_batch_size": Setting(batch.per_step, arithmetic),
        "train_micro_batch_size_per_gpu": Setting(micro, arithmetic),
        "gradient_accumulation_steps": Setting(steps, arithmetic),
        "fp16.enabled": Setting(False, precision),
        # At stage 0 the weights stay fp32 and the products are bf16, as on one process: there is no part to save.
        "bf16.enabled": Setting(bf16 and options.zero_stage > 0, precision),
        "bf16.check_grad_overflow": Setting(True, "the skipping of steps that are not finite"),
        "torch_autocast.enabled": Setting(False, precision),
        "gradient_allreduce_op": Setting("mean", "the sum over all processes that distllm takes"),
        "zero_optimization.stage": Setting(options.zero_stage, stage),
        "zero_optimization.offload_optimizer.device": Setting(
            _home(options.offload_optimizer),
            f"engine.offload_optimizer={options.offload_optimizer}",
        ),
        "zero_optimization.offload_param.device": Setting(
            _home(options.offload_param), f"engine.offload_param={options.offload_param}"
        ),
    }
    if options.bucket_mib is not None:
        size = Setting(
            options.bucket_mib * ELEMENTS_PER_MIB, f"engine.bucket_mib={options.bucket_mib}"
        )
        for name in ("reduce", "allgather", "prefetch"):
            found[f"zero_optimization.{name}_bucket_size"] = size
    if optim is not None:
        limit = optim.max_grad_norm
        found["gradient_clipping"] = Setting(limit, f"optim.max_grad_norm={limit}")
        found |= _optimizer(optim)
    return found


def defaults(options: DeepSpeedOptions, on_gpu: bool) -> dict[str, Any]:
    """Return dotted JSON key -> value where no setting of ours decides, and the user's file may."""
    found = {
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": "fp32",
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU optimizer is compiled at the first use; torch's fused one comes compiled.
        "zero_force_ds_cpu_optimizer": False,
        # It replaces torch.nn.functional.linear for the whole process.
        "zero_optimization.memory_efficient_linear": False,
    }
    if options.bucket_mib is None:
        for name in ("reduce", "allgather", "prefetch"):
            found[f"zero_optimization.{name}_bucket_size"] = 200 * ELEMENTS_PER_MIB
    for part in ("optimizer", "param"):
        if getattr(options, f"offload_{part}"):
            found[f"zero_optimization.offload_{part}.pin_memory"] = on_gpu
    return found


def merged(
    settings: Mapping[str, Setting], fallback: Mapping[str, Any], path: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Lay `settings` over the file at `path` over `fallback`.

    Returns:
        (nested JSON for the library, problems).
    """
    theirs, problems = ({}, []) if path is None else _read(path)
    foreign = {key.split(".")[0] for key in theirs} & FOREIGN.keys()
    for section in sorted(foreign):
        reason = FOREIGN[section]
        problems.append(f"engine.config={path} has the section {section}: {reason}. Take it out.")
    flat: dict[str, Any] = dict(fallback) | theirs
    for key, setting in settings.items():
        if key in theirs and not _same(theirs[key], setting.value):
            problems.append(
                f"engine.config={path} says {key}={_shown(theirs[key])}, and {setting.ours} makes it "
                f'{_shown(setting.value)}. Change one of them, or write "auto" in the file.'
            )
        flat[key] = setting.value
    # The optimizer is built by us; its section served the comparison.
    return _nested({k: v for k, v in flat.items() if k.split(".")[0] != "optimizer"}), problems


def _option_problems(options: DeepSpeedOptions) -> list[str]:
    stage, problems = options.zero_stage, []
    if options.offload_optimizer and stage == 0:
        problems.append(
            "engine.offload_optimizer=true needs cut moments, and engine.zero_stage=0 cuts nothing. "
            "Set engine.zero_stage=1, 2 or 3."
        )
    if options.offload_param and stage != 3:
        problems.append(
            f"engine.offload_param=true needs cut weights, and engine.zero_stage={stage} keeps them whole. "
            "Set engine.zero_stage=3."
        )
    return problems


def _optimizer(optim: Any) -> dict[str, Setting]:
    found = {"optimizer.type": Setting(optim.name, f"optim={optim.name}")}
    for name in ("lr", "eps", "weight_decay"):
        if hasattr(optim, name):
            value = getattr(optim, name)
            found[f"optimizer.params.{name}"] = Setting(value, f"optim.{name}={value}")
    if hasattr(optim, "beta1"):
        betas = [optim.beta1, optim.beta2]
        ours = "optim.beta1={}, optim.beta2={}".format(*betas)
        found["optimizer.params.betas"] = Setting(betas, ours)
    return found


def _home(offload: bool) -> str:
    return "cpu" if offload else "none"


def _read(path: str) -> tuple[dict[str, Any], list[str]]:
    """Return the file's entries by dotted key, without those it leaves to us by "auto"."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [
            f"engine.config={path} cannot be read: {error.strerror}. Give a DeepSpeed JSON file."
        ]
    except ValueError as error:
        return {}, [f"engine.config={path} is not JSON: {error}. Give a DeepSpeed JSON file."]
    if not isinstance(found, dict):
        return {}, [f"engine.config={path} holds no JSON object. Give a DeepSpeed JSON file."]
    flat, problems = _flat(found, path)
    for key in found:
        meant = difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.85)
        if meant and key not in SECTIONS:
            problems.append(
                f"engine.config={path} has {key}, which DeepSpeed would not read. Write {meant[0]}."
            )
    return {_usual(k): v for k, v in flat.items() if v != "auto"}, problems


def _usual(key: str) -> str:
    """Turn the other spellings that the library takes into the one used here."""
    key = key.replace("zero_optimization.stage3_", "zero_optimization.")
    return "bf16." + key.removeprefix("bfloat16.") if key.startswith("bfloat16.") else key


def _flat(tree: Mapping[str, Any], path: str, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return (dotted key -> value, problems). A section that is null or empty says nothing."""
    flat: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            more, found = _flat(value, path, f"{name}.")
            flat |= more
            problems += found
        elif name not in SECTIONS:
            flat[name] = value
        elif value:
            problems.append(
                f"engine.config={path} says {name}={_shown(value)}, which must be an object with keys of its own. Take it "
                "out, or see DeepSpeed's documentation for its keys."
            )
    return flat, problems


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return tree


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return theirs == ours


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
