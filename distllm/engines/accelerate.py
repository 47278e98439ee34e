"""Runs what a file of `accelerate config` says: copies under accelerate's own wrapper, or FSDP2, or DeepSpeed.

The file's FSDP and DeepSpeed sections become settings of `fsdp.py` and `deepspeed.py`: accelerate would hand over to the
same libraries, but take means over ranks and keep checkpoints of its own. What cannot be run as the file says is refused.

Reference: Gugger et al. 2022, Accelerate, github.com/huggingface/accelerate.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.engines import processes
from distllm.engines.base import resolve
from distllm.engines.ddp import DDP, DDPOptions
from distllm.engines.deepspeed_config import DeepSpeedOptions
from distllm.engines.fsdp import FSDPOptions
from distllm.engines.hardware import resolve_device, resolve_precision
from distllm.engines.mesh import MeshOptions, dp_size, mesh_problems
from distllm.engines.native import Caller
from distllm.engines.options import BatchSizes, EngineOptions, HardwareOptions
from distllm.errors import UserError
from distllm.registry import register
from distllm.types import free


@dataclass(kw_only=True, slots=True)
class AccelerateOptions(DDPOptions):
    """Laid out as the user's own file says."""

    name: str = free("accelerate")
    config: str | None = free(None)
    """A file of `accelerate config`. None takes the one that `accelerate launch` was given, or else accelerate's default
    file, where there is one."""


@register("engine")
class Accelerate(DDP):
    """One Accelerator per model that learns; a frozen model needs none. Files that ask for more choose another engine."""

    Options = AccelerateOptions
    options: AccelerateOptions  # type: ignore[assignment]

    @classmethod
    def choose(cls, options: AccelerateOptions) -> EngineOptions:
        return Request(options).chosen

    @classmethod
    def problems(
        cls,
        options: AccelerateOptions,
        *,
        hardware: HardwareOptions,
        precision: str,
        optim: Any,
        batch: BatchSizes,
    ) -> list[str]:
        request = Request(options)
        found = request.problems + request.contradictions(hardware, precision, optim, batch)
        engine, chosen = resolve(options)
        if engine is cls:
            return found
        found += mesh_problems(chosen, processes.world_size())
        known = {"hardware": hardware, "precision": precision, "optim": optim, "batch": batch}
        return found + [request.in_its_words(p) for p in engine.problems(chosen, **known)]

    def _wrap(self, caller: Caller) -> nn.Module:
        if self.optim is None:
            return caller
        self.accelerator = _accelerator(self.device, self.options)
        return self.accelerator.prepare_model(caller)

    def _micro_step(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.accelerator.no_sync(self.caller)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def close(self) -> None:
        super().close()
        self.accelerator: Any = None


class Request:
    """What the file asks for, in terms of our engines, and what of it cannot be had."""

    def __init__(self, options: AccelerateOptions) -> None:
        self.problems: list[str] = []
        self.path, asked = _source(options)
        self.file: Any = None if self.path is None else self._read(self.path)
        self.kind = "NO" if self.file is None else self.file.distributed_type.value
        self.num_processes = asked or (self.file.num_processes if self.file else -1)
        self.chosen: EngineOptions = options
        if self.file is None:
            if not self.problems:
                self._flags_without_a_file()
            return
        if self.kind not in _KINDS:
            known = f"distllm runs {', '.join(_KINDS)}. Make another file with `accelerate config`"
            self._refuse(known, f"distributed_type: {self.kind}")
        self._blocks(options)
        if self.kind == "FSDP":
            self._fsdp(self.file.fsdp_config)
        elif self.kind == "DEEPSPEED":
            self._deepspeed(self.file.deepspeed_config)

    def contradictions(
        self, hardware: HardwareOptions, precision: str, optim: Any, batch: BatchSizes
    ) -> list[str]:
        """Compare the file with what this machine and our other settings say."""
        found = []
        world, where = processes.world_size(), self.path or "accelerate launch"
        if self.num_processes not in (-1, world):
            found.append(
                f"{where} says num_processes: {self.num_processes}, and there are {world} processes (WORLD_SIZE). "
                f"Start {self.num_processes}, or write num_processes: {world}. Without GPUs `accelerate launch` starts "
                f"one process; torchrun --nproc-per-node={self.num_processes} -m distllm ... engine=accelerate "
                f"engine.config={self.path or 'FILE'} starts {self.num_processes}."
            )
        if self.file is None:
            return found
        try:
            device = resolve_device(hardware.device)
            bf16 = resolve_precision(precision, device) == torch.bfloat16
        except UserError:
            return found  # is reported by others
        if self.file.use_cpu and device.type != "cpu":
            found.append(
                f"{where} says use_cpu: true, and hardware.device={hardware.device} is {device.type} here. "
                "Set hardware.device=cpu, or write use_cpu: false."
            )
        mixed = str(self.file.mixed_precision or "no")
        decides = "write mixed_precision: no, and train.precision decides."
        if mixed in ("fp16", "fp8"):
            found.append(
                f"{where} says mixed_precision: {mixed}, which is not available. Write bf16, or {decides}"
            )
        elif mixed == "bf16" and not bf16:
            found.append(
                f"{where} says mixed_precision: bf16, and train.precision={precision} makes it fp32 here. "
                f"Set train.precision=bf16, or {decides}"
            )
        if self.kind == "DEEPSPEED":
            found += self._deepspeed_contradictions(optim, batch)
        return found

    def in_its_words(self, problem: str) -> str:
        """Name the place in the file where a problem of another engine comes from."""
        json_file = getattr(self.chosen, "config", None)
        return problem.replace(
            f"engine.config={json_file}", f"deepspeed_config_file: {json_file} (in {self.path})"
        )

    def _read(self, path: str) -> Any:
        from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

        try:
            found = load_config_from_file(path)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or 'there is no such file'}"
        except (
            Exception
        ) as error:  # of YAML, of JSON, and whatever accelerate raises for unknown keys
            reason = f"is no file of `accelerate config`: {error}"
        else:
            if isinstance(found, ClusterConfig):
                return found
            reason = (
                f"says compute_environment: {found.compute_environment.value}, not LOCAL_MACHINE"
            )
        self.problems.append(
            f"engine.config={path} {reason}. Make one with `accelerate config`, or start from launch/accelerate.yaml."
        )
        return None

    def _refuse(self, advice: str, what: str) -> None:
        self.problems.append(f"{self.path} says {what}: {advice}.")

    def _flags_without_a_file(self) -> None:
        for variable, flag in _FLAGS.items():
            if _is_true(os.environ.get(variable)):
                self.problems.append(
                    f"accelerate launch was given {flag} on its command line (or {variable} is set), and no file: "
                    "distllm reads these settings from a file. Make one with `accelerate config --config_file FILE` "
                    "and type accelerate launch --config_file FILE."
                )

    def _choose(self, options_of: type, **settings: Any) -> None:
        """Take options of another engine, with what it has in common with ours."""
        common = {f.name: getattr(self.chosen, f.name) for f in fields(EngineOptions)}
        self.chosen = options_of(**common | {"name": options_of().name} | settings)

    def _blocks(self, options: AccelerateOptions) -> None:
        """Take over compilation and recomputation of blocks."""
        backend = str(self.file.dynamo_config.get("dynamo_backend", "NO")).upper()
        if backend == "INDUCTOR":
            options = replace(options, compile=True)
        elif backend != "NO":
            self._refuse(
                "blocks are compiled by INDUCTOR alone. Write INDUCTOR or NO",
                f"dynamo_backend: {backend}",
            )
        if _is_true(self.file.fsdp_config.get("fsdp_activation_checkpointing")):
            ours = options.activation_checkpointing
            if ours == "selective":
                self._refuse(
                    f"engine.activation_checkpointing={ours} is something else. Set it to full, or take the key out",
                    "fsdp_activation_checkpointing: true",
                )
            options = replace(options, activation_checkpointing="full")
        self.chosen = options

    def _fsdp(self, section: dict[str, Any]) -> None:
        if int(section.get("fsdp_version", 1)) != 2:
            self._refuse(
                "distllm shards with version 2. Convert the file with "
                f"`accelerate to-fsdp2 --config_file {self.path} --output_file FILE`",
                f"fsdp_version: {section.get('fsdp_version', '1 (by leaving it out)')}",
            )
        for key, (accepted, advice) in _FSDP_LIMITS.items():
            if key in section and str(section[key]).lower() not in accepted:
                self._refuse(advice, f"{key}: {section[key]}")
        sizes = {
            k.removeprefix("parallelism_config_").removesuffix("_size"): v
            for k, v in self.file.parallelism_config.items()
            if k.endswith("_size")
        }
        for axis in ("tp", "cp", "sp"):
            if int(sizes.get(axis, 1)) > 1:
                self._refuse(
                    "through accelerate, distllm splits over data parallel processes alone. For tensor parallel set "
                    "engine=fsdp engine.mesh.tp_size=N",
                    f"parallelism_config_{axis}_size: {sizes[axis]}",
                )
        self._choose(
            FSDPOptions,
            reshard_after_forward=_is_true(section.get("fsdp_reshard_after_forward", True)),
            cpu_offload=_is_true(section.get("fsdp_offload_params")),
            mesh=MeshOptions(
                dp_replicate=int(sizes.get("dp_replicate", 1)),
                dp_shard=int(sizes.get("dp_shard", 0)) if sizes else 0,
            ),
        )

    def _deepspeed(self, section: dict[str, Any]) -> None:
        path = section.get("deepspeed_config_file")
        zero = self._zero_section(path) if path else {}
        homes = {
            part: str(
                zero.get(f"offload_{part}", {}).get("device")
                or section.get(f"offload_{part}_device")
                or "none"
            )
            for part in ("optimizer", "param")
        }
        for part, home in homes.items():
            if home not in ("none", "cpu"):
                self._refuse("distllm offloads to cpu alone", f"offload_{part}_device: {home}")
        self._choose(
            DeepSpeedOptions,
            zero_stage=int(zero.get("stage", section.get("zero_stage", 2))),
            offload_optimizer=homes["optimizer"] == "cpu",
            offload_param=homes["param"] == "cpu",
            config=path,
        )

    def _zero_section(self, path: str) -> dict[str, Any]:
        """Return what DeepSpeed's own JSON says of ZeRO; what is wrong with the file is found by that engine."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))["zero_optimization"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {k: v for k, v in found.items() if v != "auto"}

    def _deepspeed_contradictions(self, optim: Any, batch: BatchSizes) -> list[str]:
        """Numbers that the file repeats: they must be those that follow from our settings."""
        micro, size = batch.per_micro_step, dp_size(self.chosen)
        ours = {
            "gradient_accumulation_steps": (
                batch.per_step // (micro * size),
                f"train.global_batch_size={batch.per_step}, train.micro_batch_size={micro} and {size} processes make it",
            )
        }
        if optim is not None:
            limit = optim.max_grad_norm
            ours["gradient_clipping"] = (limit, f"optim.max_grad_norm={limit} makes it")
        found = []
        for key, (value, why) in ours.items():
            theirs = self.file.deepspeed_config.get(key)
            if theirs not in (None, "auto", "none") and float(theirs) != float(value or 0.0):
                found.append(
                    f"{self.path} says {key}: {theirs}, and {why} {value}. Change one of them, or take the line out."
                )
        return found


_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")

_FLAGS = {f"ACCELERATE_USE_{k.upper()}": f"--use_{k}" for k in ("fsdp", "deepspeed", "megatron_lm")}
"""What `accelerate launch` sets -> the flag that makes it do so without a file."""

_FSDP_LIMITS = {
    "fsdp_auto_wrap_policy": (
        ("transformer_based_wrap", "no_wrap"),
        "distllm shards block by block. Write TRANSFORMER_BASED_WRAP",
    ),
    "fsdp_activation_checkpointing_offload": (
        ("false", "none"),
        "recomputed blocks keep their inputs on the device. Write false",
    ),
    "fsdp_ignored_modules": (("none", ""), "every weight is sharded. Take the key out"),
}
"""Key -> (values that can be had, what to do otherwise)."""


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _source(options: AccelerateOptions) -> tuple[str | None, int | None]:
    """Return (the file that holds, the number of processes asked for on the launcher's command line)."""
    from accelerate.commands.config.config_args import default_config_file

    words = _launcher_words()
    asked = _value_of("num_processes", words)
    path = options.config or _value_of("config_file", words)
    if path is None and Path(default_config_file).is_file():
        path = str(default_config_file)
    return path, None if asked is None else int(asked)


def _launcher_words() -> list[str]:
    """Return the options of the `accelerate launch` that started this process: it tells its workers too little."""
    if (
        "ACCELERATE_MIXED_PRECISION" not in os.environ
    ):  # set by that launcher, whatever the file says
        return []
    import psutil

    try:
        lines = [p.cmdline() for p in psutil.Process().parents()]
    except psutil.Error:
        return []
    for words in lines:
        for index, word in enumerate(words[:4]):
            name = Path(word).name
            started = name == "accelerate" and words[index + 1 : index + 2] == ["launch"]
            if started or name == "accelerate-launch":
                options = words[index + 1 :]
                return options[: options.index("distllm")] if "distllm" in options else options
    return []


def _value_of(option: str, words: list[str]) -> str | None:
    """Read `--option VALUE` or `--option=VALUE`, with hyphens or underscores."""
    for index, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") == option:
            return value if equals else "".join(words[index + 1 : index + 2])
    return None


_world: Any = None
"""The process group that accelerate's state was made for."""


def _accelerator(device: torch.device, options: AccelerateOptions) -> Any:
    """Let accelerate find the process group there is; precision, accumulation and clipping stay ours."""
    global _world
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or it sets its own
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    if dist.group.WORLD is not _world:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        _world = dist.group.WORLD
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                bucket_cap_mb=options.bucket_mib,
                find_unused_parameters=options.find_unused_parameters,
                gradient_as_bucket_view=True,  # the gradients live in the buckets: no second copy
            )
        ],
    )
