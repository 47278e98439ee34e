"""Stages chained into rounds. Started again with the same `run.dir`, a pipeline goes on at the unfinished stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distllm.config.compose import compose
from distllm.config.schema import Config
from distllm.engines import collectives
from distllm.engines.processes import phase
from distllm.errors import ConfigError
from distllm.pipeline.collect import collect_pairs, pair_files
from distllm.pipeline.options import PipelineOptions, PipelineStage
from distllm.pipeline.session import leave_stopped, session, stop_agreed
from distllm.pipeline.stage import read_result, run_stage
from distllm.pipeline.table import bars
from distllm.tracking.console import setup_logging
from distllm.tracking.report import write_report
from distllm.train.files import atomic_write_json
from distllm.train.run_dir import RunDir
from distllm.train.signals import StopFlag

_log = logging.getLogger("distllm")

KINDS = ("train", "collect")


@dataclass(slots=True)
class PipelineResult:
    """How a pipeline ended."""

    finished: bool
    """False when a signal stopped it; start it again to go on."""
    run_dir: Path
    table: list[dict[str, Any]]
    """Rows of `pipeline.json`: stage, metric, before, after, bar, ok, note."""
    report: Path | None


@dataclass(frozen=True, slots=True)
class Job:
    """One stage in one round, with the directories it depends on."""

    stage: PipelineStage
    round: int
    folder: Path
    parent: Path | None
    reward_model: Path | None
    pairs: Path | None


def run_pipeline(config: Config) -> PipelineResult:
    """Run every stage that has not finished, then write `pipeline.json` and `report.html`.

    Raises:
        UserError: a stage cannot run as configured; earlier stages stay as they are.
    """
    started = time.monotonic()
    run = RunDir(config.run.dir)
    jobs = plan_jobs(config.pipeline, run.path)
    configs = [job_config(config, job) for job in jobs]
    with StopFlag() as stop, session(config):
        for index, (job, stage_config) in enumerate(zip(jobs, configs, strict=True), start=1):
            _log.info("Stage %d/%d: %s.", index, len(jobs), job.folder.name)
            if job.stage.kind == "collect":
                collect_pairs(stage_config)
                finished = True
            else:
                finished = run_stage(stage_config, stop).finished
            setup_logging(run.path, collectives.rank())
            if not finished or stop_agreed(stop):
                leave_stopped(run.path, 0)
                return PipelineResult(False, run.path, [], None)
        summary = collectives.from_main(lambda: summarise(config, run.path, jobs))
        summary["wall_s"] = time.monotonic() - started
        with phase("export"):
            collectives.on_main(lambda: _finish(run.path, summary))
    return PipelineResult(True, run.path, summary["table"], run.path / "report.html")


def _finish(folder: Path, summary: dict[str, Any]) -> None:
    atomic_write_json(folder / "pipeline.json", summary)
    write_report([folder], folder / "report.html")


def plan_jobs(options: PipelineOptions, folder: Path) -> list[Job]:
    """Unroll the rounds and resolve which directory each stage takes from.

    Raises:
        ConfigError: a stage is unknown, named twice, or takes from one that does not come before it.
    """
    jobs: list[Job] = []
    done: dict[str, Path] = {}
    for number in range(1, options.rounds + 1):
        policy = done.get(options.policy)
        for stage in options.stages:
            if number > 1 and not stage.per_round:
                continue
            if stage.kind not in KINDS:
                raise ConfigError(
                    f"pipeline={options.name}: stage {stage.name} has kind={stage.kind}. Known: {', '.join(KINDS)}."
                )
            parent = _earlier(options, stage, "parent", done)
            first_stage = _stage_named(options, stage.parent)
            if number > 1 and first_stage is not None and not first_stage.per_round:
                if policy is None:
                    raise ConfigError(
                        f"pipeline.rounds={options.rounds} needs pipeline.policy: the stage whose model the "
                        "next round starts from."
                    )
                parent = policy
            name = stage.name if number == 1 else f"{stage.name}-{number}"
            jobs.append(
                Job(
                    stage,
                    number,
                    folder / name,
                    parent,
                    _earlier(options, stage, "reward_model", done),
                    _earlier(options, stage, "pairs", done),
                )
            )
            if number == 1 and stage.name in done:
                raise ConfigError(f"pipeline={options.name} names stage {stage.name} twice.")
            done[stage.name] = folder / name
    if not jobs:
        raise ConfigError(
            f"pipeline={options.name} has no stages. Set pipeline=demo, or see `distllm list pipeline`."
        )
    return jobs


def job_config(config: Config, job: Job) -> Config:
    """Compose the config of one stage: its own settings, and what the whole pipeline shares."""
    settings = {"run.dir": str(job.folder)}
    if job.parent is not None:
        settings["model"] = str(job.parent / "model")
    if job.reward_model is not None:
        settings["stage.reward_model"] = str(job.reward_model / "model")
    if job.pairs is not None:
        settings |= pair_files(job.pairs)
    composed = compose(
        [
            *config.pipeline.shared,
            *job.stage.overrides,
            *(f"{k}={_quoted(v)}" for k, v in settings.items()),
        ]
    )
    return replace(
        composed,
        run=replace(composed.run, seed=config.run.seed),
        arch=composed.arch if _chooses(job.stage, "arch") else config.arch,
        # An adapter stands beside weights that were learned before.
        adapter=composed.adapter
        if _chooses(job.stage, "adapter") or not job.parent
        else config.adapter,
        engine=config.engine,
        hardware=config.hardware,
        tracking=config.tracking,
        train=replace(composed.train, precision=config.train.precision),
    )


def summarise(config: Config, folder: Path, jobs: list[Job]) -> dict[str, Any]:
    """Gather what the stages reported."""
    results = {job.folder.name: read_result(job.folder) or {} for job in jobs}
    stages = [
        {
            "name": job.folder.name,
            "dir": job.folder.name,
            "round": job.round,
            "kind": job.stage.kind,
        }
        for job in jobs
    ]
    metrics: Mapping[str, Any] = next(
        (r["metrics"] for r in results.values() if r.get("stage") == "pretrain"), {}
    )
    baselines = {
        k.removeprefix("baseline/"): v for k, v in metrics.items() if k.startswith("baseline/")
    }
    return {
        "name": config.pipeline.name,
        "seed": config.run.seed,
        "stages": stages,
        "table": bars(results),
        "baselines": baselines,
    }


def _earlier(
    options: PipelineOptions, stage: PipelineStage, field: str, done: Mapping[str, Path]
) -> Path | None:
    name = getattr(stage, field)
    if not name:
        return None
    if name not in done:
        known = ", ".join(done) or "none"
        raise ConfigError(
            f"pipeline={options.name}: stage {stage.name} has {field}={name}, which is no stage before it ({known})."
        )
    return done[name]


def _stage_named(options: PipelineOptions, name: str) -> PipelineStage | None:
    return next((s for s in options.stages if s.name == name), None)


def _chooses(stage: PipelineStage, group: str) -> bool:
    """Say whether a stage has an option of `group` of its own."""
    return any(o.startswith(f"{group}=") for o in stage.overrides)


def _quoted(value: str) -> str:
    """Quote a value for an override, so that paths with spaces and commas survive."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return value if value.isidentifier() else f"'{escaped}'"
