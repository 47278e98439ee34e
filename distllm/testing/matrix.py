"""Every cell of architecture x stage as a toy that must be learned, and the record of what was: `distllm list matrix`.

`python -m distllm.testing.matrix` runs all cells and writes the record; the tests run the same cells.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distllm.config.compose import compose
from distllm.config.files import matrix_file
from distllm.data.tokenizer import save_tokenizer, train_tokenizer
from distllm.data.vocabulary import SPECIAL_TOKENS
from distllm.pipeline.stage import run_stage
from distllm.testing.toys import toy_texts, write_toy

ARCHES = {
    "encoder": "bert_tiny",
    "decoder": "llama_tiny",
    "encoder-decoder": "t5_tiny",
    "GLM": "glm_tiny",
    "LSTM": "lstm_tiny",
}
"""Row of the table -> preset whose switches the toy has."""

_SHAPE = [
    "arch.vocab_size=448", "arch.d_model=64", "arch.n_layers=2", "arch.n_heads=4", "arch.n_kv_heads=4", "arch.d_head=16",
    "arch.d_ff=128", "arch.max_seq_len=96",
]  # fmt: skip
_COMMON = [
    "train.precision=fp32", "train.seq_len=32", "train.global_batch_size=64", "train.micro_batch_size=64",
    "train.num_eval_samples=200", "hardware.threads=1", "train.save_every_steps=1000", "data=file",
    "data.heldout_fraction=0.15", "optim.lr=3e-3", "schedule.warmup_steps=10",
]  # fmt: skip
_RL = [
    "stage.num_samples=8",
    "generation.max_new_tokens=3",
    "optim.lr=1e-3",
    "optim.weight_decay=0",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """A toy of one architecture in one stage."""

    arch: str
    column: str
    what: str
    """What is learned, in a word or two."""
    toy: str
    """Data: see `toys.py`."""
    overrides: tuple[str, ...]
    metric: str
    """What must become better, as in result.json without `before/` and `after/`."""
    target: float
    """The value after training must reach this."""
    parent: str = ""
    """Key of the cell whose model this one starts from."""
    judge: str = ""
    """Key of the cell whose model scores the responses."""

    @property
    def key(self) -> str:
        """Name of the cell."""
        return f"{self.arch} {self.what}"

    @property
    def lower_is_better(self) -> bool:
        """True for losses."""
        return self.metric == "loss"


def _cells() -> list[Cell]:
    found = []

    def add(
        arch: str,
        column: str,
        what: str,
        toy: str,
        metric: str,
        target: float,
        *overrides: str,
        **more: str,
    ) -> None:
        found.append(Cell(arch, column, what, toy, overrides, metric, target, **more))

    steps = {"mlm": 300, "span": 200, "ul2": 250, "prefix": 150}
    for arch, objectives in {
        "encoder": ["mlm"], "decoder": ["clm", "prefix"], "encoder-decoder": ["span", "ul2", "prefix"],
        "GLM": ["blank", "prefix"], "LSTM": ["clm"],
    }.items():  # fmt: skip
        for what in objectives:
            settings = [
                "stage=pretrain",
                f"stage.objective={what}",
                f"train.max_steps={steps.get(what, 120)}",
            ]
            if arch == "LSTM":
                settings.append("train.max_steps=200")
            add(arch, "pretrain", what, "texts", "loss", 1.5, *settings)
    for what, toy in {"classify": "labelled", "classify pairs": "labelled_pairs"}.items():
        add("encoder", "SFT", what, toy, "accuracy", 0.9, "stage=classify", "train.max_steps=100")
    add("encoder", "SFT", "tag", "tagged", "f1", 0.9, "stage=tag", "train.max_steps=80")
    add(
        "encoder",
        "reward",
        "reward",
        "pairs",
        "accuracy",
        0.9,
        "stage=reward",
        "train.max_steps=500",
    )
    add(
        "encoder",
        "RL",
        "bandit",
        "labelled",
        "exact_match",
        0.9,
        "stage=grpo",
        "train.max_steps=60",
        *_RL,
    )
    add(
        "encoder",
        "RL",
        "bandit ppo",
        "labelled",
        "exact_match",
        0.9,
        "stage=ppo",
        "train.max_steps=80",
        *_RL,
        "stage.kl_coef=0",
    )
    few = {"decoder": 60, "encoder-decoder": 60, "GLM": 90, "LSTM": 65}
    for arch, num_steps in few.items():
        rl = (
            *_RL,
            "train.global_batch_size=256",
            "train.micro_batch_size=256",
            "generation.max_new_tokens=2",
        )
        first = f"{arch} first answers"
        add(
            arch,
            "SFT",
            "answers",
            "parallel",
            "exact_match",
            0.9,
            "stage=sft",
            "train.max_steps=250",
        )
        add(
            arch,
            "SFT",
            "first answers",
            "parallel",
            "exact_match",
            0.1,
            "stage=sft",
            f"train.max_steps={num_steps}",
        )
        add(
            arch,
            "reward",
            "reward",
            "pairs",
            "accuracy",
            0.9,
            "stage=reward",
            "train.max_steps=200",
        )
        add(
            arch,
            "RL",
            "grpo",
            "parallel",
            "exact_match",
            0.7,
            "stage=grpo",
            "train.max_steps=150",
            *rl,
            parent=first,
        )
        add(
            arch,
            "RL",
            "ppo",
            "parallel",
            "exact_match",
            0.7,
            "stage=ppo",
            "train.max_steps=200",
            *rl,
            "stage.kl_coef=0",
            parent=first,
        )
    add(
        "decoder", "RL", "judged by an encoder", "parallel", "reward", -0.3, "stage=dr_grpo", "train.max_steps=200",
        *_RL, "train.global_batch_size=256", "train.micro_batch_size=256", "generation.max_new_tokens=2", "stage.kl_coef=0", "stage.truncated=penalise", "stage.truncated_penalty=5", "stage.reward=classifier",
        "stage.reward_reads=pair", parent="decoder first answers", judge="encoder reward",
    )  # fmt: skip
    return found


CELLS = {cell.key: cell for cell in _cells()}


@dataclass(slots=True)
class Result:
    """What a cell reached."""

    key: str
    arch: str
    column: str
    what: str
    metric: str
    before: float
    after: float
    target: float
    seconds: float = field(default=0.0)

    @property
    def learned(self) -> bool:
        """True where the target was reached, coming from the other side of it."""
        sign = -1 if self.metric == "loss" else 1
        return sign * self.after >= sign * self.target > sign * self.before


def run_cell(key: str, folder: Path) -> Result:
    """Run a cell, and before it the cells that it builds on, below `folder`; what is there already is not run again."""
    cell = CELLS[key]
    for needed in (cell.parent, cell.judge):
        if needed:
            run_cell(needed, folder)
    run_dir = folder / key.replace(" ", "_")
    started = time.monotonic()
    data = folder / f"{cell.toy}.jsonl"
    if not data.exists():
        write_toy(cell.toy, data)
    overrides = [f"arch={ARCHES[cell.arch]}", *_known(cell.arch), *_COMMON, *cell.overrides]
    overrides += [f"data.path='{data}'", f"run.dir='{run_dir}'"]
    if cell.parent:
        overrides.append(f"model='{_model_of(cell.parent, folder)}'")
    else:
        overrides.append(f"tokenizer='{_tokenizer(cell.arch, folder)}'")
    if cell.judge:
        overrides.append(f"stage.reward_model='{_model_of(cell.judge, folder)}'")
    metrics = run_stage(compose(overrides)).metrics
    return Result(
        key, cell.arch, cell.column, cell.what, cell.metric,
        metrics[f"before/{cell.metric}"], metrics[f"after/{cell.metric}"], cell.target,
        round(time.monotonic() - started, 1),
    )  # fmt: skip


def _known(arch: str) -> list[str]:
    """Leave out the settings that an architecture does not have."""
    if arch != "LSTM":
        return _SHAPE
    return ["arch.vocab_size=448", "arch.d_model=64", "arch.d_hidden=96", "arch.n_layers=2", "arch.max_seq_len=96", "arch.init_std=0.15"]  # fmt: skip


def _model_of(key: str, folder: Path) -> Path:
    return folder / key.replace(" ", "_") / "model"


def _tokenizer(arch: str, folder: Path) -> Path:
    """Train the toy tokenizer of an architecture once. No two have the same ids."""
    path = folder / f"tokenizer_{arch}"
    if not path.exists():
        names = {"encoder-decoder": "encoder_decoder", "GLM": "glm"}
        special = SPECIAL_TOKENS.get(names.get(arch, arch), ())
        save_tokenizer(train_tokenizer(toy_texts(), 448, special), path)
    return path


def main(wanted: list[str]) -> None:
    """Run all cells, or those named, and write the record."""
    known = {r["key"]: r for r in read_record()}
    with tempfile.TemporaryDirectory() as folder:
        for key in wanted or CELLS:
            result = run_cell(key, Path(folder))
            known[key] = asdict(result) | {"learned": result.learned}
            sys.stdout.write(f"{key}: {result}\n")
            rows = [known[key] for key in CELLS if key in known]
            matrix_file().write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_record() -> list[dict]:
    """Read what was learned when all cells were last run."""
    path = matrix_file()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


if __name__ == "__main__":
    main(sys.argv[1:])
