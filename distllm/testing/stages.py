"""Whole stages at toy size, for tests that run the real thing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distllm.config.compose import compose
from distllm.pipeline.stage import StageResult, run_stage

TINY = [
    "arch.vocab_size=512",
    "arch.d_model=16",
    "arch.n_layers=2",
    "arch.n_heads=4",
    "arch.n_kv_heads=2",
    "arch.d_ff=32",
    "arch.max_seq_len=96",
    "train.precision=fp32",
    "train.seq_len=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.num_eval_samples=8",
    "hardware.threads=1",
]
SKILLS = [
    "data=skills",
    "data.tasks=[copy_words,sort_digits]",
    "data.num_train=24",
    "data.num_prompts=24",
    "data.num_heldout=8",
    "generation.max_new_tokens=6",
]


class StopAfter:
    """A stop flag that goes up once `steps` steps have begun."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:
        """Count down; True when no step may begin any more."""
        self.left -= 1
        return self.left < 0


def write_text(path: Path, num_topics: int = 6) -> Path:
    """Write a little real text, which every Python carries."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics)[:num_topics]))
    return path


def run_tiny(folder: Path, overrides: list[str], stop: Any = None) -> StageResult:
    """Compose and run one stage at toy size in `folder`."""
    return run_stage(compose([*TINY, *overrides, f"run.dir='{folder}'"]), stop)


def tiny_model(folder: Path) -> Path:
    """Pretrain a toy model for two steps below `folder`; return its directory."""
    text = write_text(folder / "text.txt")
    run_tiny(
        folder / "run", ["stage=pretrain", "data=file", f"data.path='{text}'", "train.max_steps=2"]
    )
    return folder / "run" / "model"


def weights_hash(run_dir: Path) -> str:
    """Return the SHA-256 of a finished run's exported weights."""
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def timeless_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without what depends on the clock or on memory."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    clocks = ("perf/", "time/", "mem/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(clocks)} for line in lines
    ]
