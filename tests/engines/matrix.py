"""The engine matrix: the same ten steps of every stage under every engine, and how far each is from one process.

`run` is what each rank does; `differences` compares two directories of runs. A row of `CELLS` is all that a further engine
needs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from distllm.config.compose import compose
from distllm.engines.processes import processes
from distllm.generation import backend
from distllm.generation import generate as generation
from distllm.generation.rollouts import pack_rollouts, unpack_rollouts
from distllm.rl.objective import PolicyObjective
from distllm.testing.stages import SKILLS, run_tiny

HERE = Path(__file__).parent
# At the usual sizes DeepSpeed would cut no weight of these models.
SMALL_PARTS = [f"engine.config='{HERE / 'small_parts.json'}'"]

CELLS: dict[str, tuple[int, list[str]]] = {
    "ddp x2": (2, ["engine=ddp"]),
    "fsdp x2": (2, ["engine=fsdp"]),
    "fsdp x4": (4, ["engine=fsdp"]),
    "hsdp 2x2": (4, ["engine=fsdp", "engine.mesh.dp_replicate=2"]),
    "tp 2": (2, ["engine=fsdp", "engine.mesh.tp_size=2"]),
    "dp 2 x tp 2": (4, ["engine=fsdp", "engine.mesh.tp_size=2"]),
    "fsdp x2, offload": (2, ["engine=fsdp", "engine.cpu_offload=true"]),
    "fsdp x2, kept": (
        2,
        ["engine=fsdp", "engine.reshard_after_forward=false", "engine.no_sync=true"],
    ),
    "ddp x2, checkpointed": (2, ["engine=ddp", "engine.activation_checkpointing=full"]),
    "fsdp x2, checkpointed": (2, ["engine=fsdp", "engine.activation_checkpointing=full"]),
    "zero 0 x2": (2, ["engine=deepspeed", "engine.zero_stage=0"]),
    "zero 1 x2": (2, ["engine=deepspeed", "engine.zero_stage=1", *SMALL_PARTS]),
    "zero 2 x2": (2, ["engine=deepspeed", "engine.zero_stage=2", *SMALL_PARTS]),
    "zero 3 x2": (2, ["engine=deepspeed", "engine.zero_stage=3", *SMALL_PARTS]),
    "zero 3 x2, offload": (
        2,
        [
            "engine=deepspeed",
            "engine.zero_stage=3",
            "engine.offload_optimizer=true",
            "engine.offload_param=true",
            *SMALL_PARTS,
        ],
    ),
    "accelerate x2": (2, ["engine=accelerate", f"engine.config='{HERE / 'accelerate_cpu.yaml'}'"]),
    "accelerate x2, its fsdp": (
        2,
        ["engine=accelerate", f"engine.config='{HERE / 'accelerate_fsdp.yaml'}'"],
    ),
    "accelerate x2, its zero 3": (
        2,
        ["engine=accelerate", f"engine.config='{HERE / 'accelerate_zero.yaml'}'"],
    ),
    "tp 2, selective": (
        2,
        ["engine=fsdp", "engine.mesh.tp_size=2", "engine.activation_checkpointing=selective"],
    ),
}
"""Name -> (number of processes, settings)."""

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
NUM_STEPS = 10
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-5, "weights": 1e-4}
"""Of the loss: relative to the larger of |loss| and the sum of |contributions| / weight. Of weights: absolute."""

COMMON = [
    f"train.max_steps={NUM_STEPS}",
    "train.micro_batch_size=2",
    "train.log_every_steps=1",
    "train.save_every_steps=100",
    "optim.lr=1e-3",
    "arch.dropout=0",
]


def settings_of(stage: str, text: str, parent: str, judge: str) -> list[str]:
    """Return the settings of `stage`: uneven lengths, several micro-batches, and in RL rewards that differ."""
    rl = [*SKILLS, f"model='{parent}'", f"stage.reward_model='{judge}'"]
    return {
        "pretrain": ["stage=pretrain", "data=file", f"data.path='{text}'"],
        "sft": ["stage=sft", *SKILLS, f"model='{parent}'"],
        "reward": ["stage=reward", *SKILLS, f"model='{parent}'"],
        "ppo": ["stage=ppo", *rl, "stage.rollout_batch_size=16"],
        "grpo": ["stage=grpo", *rl, "stage.num_samples=4"],
    }[stage]


def run(
    folder: str, text: str, parent: str, judge: str, settings: list[str], rollouts: str
) -> None:
    """Run every stage under one engine, in one process group; each rank calls this.

    Args:
        folder: for the runs.
        text: file to pretrain on.
        parent: model to start from.
        judge: reward model.
        settings: of the engine.
        rollouts: folder of rollouts; those that are not there yet are sampled and written.
    """
    config = compose([*settings, "run.dir=unused"])
    replayed = mock.patch.object(backend, "generate", _Replay(Path(rollouts)))
    measured = mock.patch.object(PolicyObjective, "loss", _with_scale(PolicyObjective.loss))
    with processes(config.engine, torch.device("cpu")), replayed, measured:
        for stage in STAGES:
            own = settings_of(stage, text, parent, judge)
            run_tiny(Path(folder) / stage, [*COMMON, *own, *settings])


class _Replay:
    """Stands where RL asks for responses: gives recorded ones, so that every engine learns from the same tokens.

    What an engine samples itself is compared in the evaluations, which decode greedily.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: Any, prompt_ids: Any, options: Any, **kwargs: Any) -> Any:
        sampled = generation.generate(model, prompt_ids, options, **kwargs)
        if "num_samples" not in kwargs:  # an evaluation
            return sampled
        indices, seed = kwargs["prompt_indices"], kwargs["seed"]
        path = self.folder / f"{kwargs['num_samples']}-{seed}.safetensors"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            safetensors.torch.save_file(pack_rollouts(sampled), path)
            return sampled
        recorded = unpack_rollouts(safetensors.torch.load_file(path))
        wanted = [r for index in indices for r in recorded if r.prompt_index == index]
        same = [a.response_ids == b.response_ids for a, b in zip(sampled, wanted, strict=True)]
        assert sum(same) >= len(same) - 1, "the engine's own samples differ from a single process's"
        return wanted


def _with_scale(loss: Any) -> Any:
    """Let the policy objective report the sum of |contributions| / weight: an on-policy loss itself is about 0."""

    def run(self: Any, model: Any, batch: Any) -> Any:
        out = loss(self, model, batch)
        tokens = self._tokens(batch)
        sizes = tokens.take(batch.advantages).abs() * tokens.weights
        out.metrics["scale"] = (sizes[tokens.learned].sum(), tokens.total)
        return out

    return run


def read(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Return the lines of the training steps of a run."""
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "train/loss" in m or "value/loss" in m]


def differences(single: Path, other: Path) -> dict[str, dict[str, float]]:
    """Compare the runs in two folders: stage -> largest difference of loss, gradient norm, weights; `samples` 1 = equal."""
    found = {}
    for stage in STAGES:
        one, many = read(single, stage), read(other, stage)
        assert len(one) == len(many) == NUM_STEPS, (stage, len(one), len(many))
        worst = {"loss": 0.0, "grad_norm": 0.0}
        for a, b in zip(one, many, strict=True):
            for role in ("train", "value"):
                if f"{role}/loss" not in a:
                    continue
                scale = max(abs(a[f"{role}/loss"]), a.get(f"{role}/scale", 0.0))
                loss = abs(a[f"{role}/loss"] - b[f"{role}/loss"]) / scale
                norm = abs(a[f"{role}/grad_norm"] / b[f"{role}/grad_norm"] - 1)
                worst = {
                    "loss": max(worst["loss"], loss),
                    "grad_norm": max(worst["grad_norm"], norm),
                }
        weights = [
            safetensors.torch.load_file(f / stage / "model" / "model.safetensors")
            for f in (single, other)
        ]
        assert weights[0].keys() == weights[1].keys()
        worst["weights"] = max(
            (weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0]
        )
        assert all(math.isfinite(v) for v in worst.values())
        samples = [_texts(f / stage / "samples.jsonl") for f in (single, other)]
        assert samples[0]
        worst["samples"] = float(samples[0] == samples[1])
        found[stage] = worst
    return found


def _texts(path: Path) -> list[dict[str, Any]]:
    """Return sampled records without their scores."""
    records = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in r.items() if not isinstance(v, float)} for r in records]
