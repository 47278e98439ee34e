"""Reads what runs left on the disk into plain objects for the report. Every piece may be missing.

A *train run directory* holds one stage; a *pipeline directory* holds `pipeline.json` and one train run directory per
stage. Nothing here imports torch: a report can be made on any machine.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distllm.errors import DataError
from distllm.tracking.advice import Advice, Advisor
from distllm.tracking.lines import numbers, read_jsonl

MARKERS = ("metrics.jsonl", "result.json", "samples.jsonl")
"""A directory that holds one of these is a train run directory."""

MAX_COLLECTED = 40
"""Records shown of what a stage collected for another one: preference pairs in `heldout.jsonl`."""


@dataclass(slots=True)
class Curve:
    """One metric over the steps at which it was logged."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    """Same length as `steps`; may hold NaN and infinities."""


@dataclass(slots=True, kw_only=True)
class StageData:
    """One stage of one run."""

    name: str
    """What the pipeline calls it."""
    kind: str
    """What is learned: pretrain, sft, reward, or the name of an RL algorithm."""
    round: int
    folder: Path
    curves: dict[str, Curve]
    samples: list[dict[str, Any]]
    result: dict[str, Any]
    lineage: dict[str, Any]
    config: str
    """The text of config.yaml."""
    advice: list[Advice] = field(default_factory=list)
    """What the console said when a threshold was crossed."""

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured at the end, as `before/x`, `after/x`, or plain names."""
        return numbers(_mapping(self.result.get("metrics")))

    @property
    def is_rl(self) -> bool:
        """True if the stage sampled and scored."""
        return any(name.startswith("rl/") for name in self.curves)


@dataclass(slots=True, kw_only=True)
class RunData:
    """A pipeline, or a single stage as a pipeline of one."""

    name: str
    folder: Path
    seed: Any = None
    wall_s: float | None = None
    table: list[dict[str, Any]] = field(default_factory=list)
    baselines: dict[str, float] = field(default_factory=dict)
    stages: list[StageData] = field(default_factory=list)


def load_runs(folders: Iterable[Path]) -> list[RunData]:
    """Load each directory; runs of the same name get their folder's path to tell them apart.

    Raises:
        DataError: there is no run in one of them.
    """
    runs = [load_run(Path(folder)) for folder in folders]
    if not runs:
        raise DataError("No run to report on. Type: distllm report RUN_DIR [RUN_DIR ...]")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def load_run(folder: Path) -> RunData:
    """Load a pipeline directory or a train run directory."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a directory. Give the run.dir of a finished or running run."
        )
    pipeline = read_object(folder / "pipeline.json")
    entries = [entry for entry in _list(pipeline.get("stages")) if isinstance(entry, dict)]
    if not entries and any((folder / name).is_file() for name in MARKERS):
        entries = [{"dir": "."}]
    elif not entries:  # a pipeline that was stopped before it wrote its record
        found = {path.parent for name in MARKERS for path in folder.glob(f"*/{name}")}
        found |= {path.parent for name in MARKERS for path in folder.glob(f"*/*/{name}")}
        entries = [{"dir": str(p.relative_to(folder))} for p in sorted(found, key=_started)]
    stages = [
        load_stage(folder / str(entry.get("dir", entry.get("name", "."))), entry)
        for entry in entries
    ]
    if not stages and not pipeline:
        raise DataError(
            f"{folder} holds no run: neither pipeline.json nor {', '.join(MARKERS)} in it or in "
            "its subdirectories. Give the run.dir of a run that has started."
        )
    clocks = [w for w in (number(stage.result.get("wall_s")) for stage in stages) if w is not None]
    only = stages[0] if len(stages) == 1 else None
    baselines = numbers(_mapping(pipeline.get("baselines")))
    for stage in stages:
        if stage.kind == "pretrain" and not baselines:
            found = {key.removeprefix("baseline/"): v for key, v in stage.metrics.items()}
            baselines = {key: v for key, v in found.items() if key not in stage.metrics}
    return RunData(
        name=str(pipeline.get("name") or folder.resolve().name),
        folder=folder,
        seed=pipeline.get("seed", only.lineage.get("seed") if only else None),
        wall_s=number(pipeline.get("wall_s")) or (sum(clocks) if clocks else None),
        table=[row for row in _list(pipeline.get("table")) if isinstance(row, dict)],
        baselines=baselines,
        stages=stages,
    )


def load_stage(folder: Path, entry: dict[str, Any]) -> StageData:
    """Load one train run directory; `entry` is what pipeline.json says about it."""
    result, lineage = read_object(folder / "result.json"), read_object(folder / "lineage.json")
    curves: dict[str, Curve] = {}
    logged_stage = None
    advisor, advice = Advisor(), []
    for row in read_jsonl(folder / "metrics.jsonl"):
        step = number(row.get("step"))
        if step is None:
            continue
        logged_stage = row.get("stage", logged_stage)
        advice += advisor.look(int(step), row)
        for name, value in numbers(row).items():
            curve = curves.setdefault(name, Curve())
            if curve.steps and curve.steps[-1] == step:  # logged twice: the later word counts
                curve.values[-1] = value
            else:
                curve.steps.append(step)
                curve.values.append(value)
    name, round_ = _name_and_round(folder, entry, lineage)
    name = name or result.get("stage") or logged_stage or folder.resolve().name
    collected = itertools.islice(read_jsonl(folder / "heldout.jsonl"), MAX_COLLECTED)
    return StageData(
        name=str(name),
        kind=str(result.get("stage") or logged_stage or name),
        round=round_,
        folder=folder,
        curves=curves,
        samples=[*read_jsonl(folder / "samples.jsonl"), *collected],
        result=result,
        lineage=lineage,
        config=_text(folder / "config.yaml"),
        advice=advice,
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is an empty one."""
    try:
        return _mapping(json.loads(_text(path)))
    except ValueError:
        return {}


def number(value: Any) -> float | None:
    """Return `value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _name_and_round(
    folder: Path, entry: dict[str, Any], lineage: dict[str, Any]
) -> tuple[str, int]:
    """Return what the pipeline calls the stage, without the round that its later directories carry: `ppo-2`."""
    name, known = str(entry.get("name") or ""), number(entry.get("round", lineage.get("round")))
    suffix = re.search(r"-(\d+)$", name or folder.name)
    round_ = int(known) if known else int(suffix[1]) if suffix and not name else 1
    if round_ > 1:
        name = name.removesuffix(f"-{round_}")
    return name, round_


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _started(folder: Path) -> tuple[float, str]:
    """Order the stages of a pipeline by when their config was written."""
    config = folder / "config.yaml"
    return (config.stat().st_mtime if config.is_file() else math.inf, str(folder))
