"""`distllm plan`: what a run would be, in numbers, without starting it."""

from collections.abc import Mapping, Sequence
from typing import Any

from distllm.cli.arguments import split

HELP = """
usage: distllm plan [the settings of distllm train]
       distllm plan pipeline=NAME [the settings of distllm pipeline]

Prints batch arithmetic, parameters per part, FLOPs per token and memory per process; for a pipeline, one line per
stage. Starts nothing, writes nothing.

Examples:
  distllm plan train.seq_len=512 train.global_batch_size=64
  distllm plan stage=ppo data=skills model=runs/sft/model
"""
OWN = {"format": "table (default) or json"}


def run(arguments: Sequence[str]) -> int:
    """Print the plan."""
    given = split("plan", arguments, OWN)

    from distllm.config.checks import check_training
    from distllm.config.compose import compose
    from distllm.config.plan import count_epochs, make_plan, to_json
    from distllm.errors import ConfigError
    from distllm.registry import unknown_name

    kind = given.own.get("format", "table")
    if kind not in ("table", "json"):
        raise ConfigError(unknown_name("format", kind, ("table", "json")))
    config = compose(given.overrides, also_known=OWN)
    if config.pipeline.stages:
        return _plan_pipeline(config)
    check_training(config)
    plan = make_plan(config)
    plan.batch.update(count_epochs(config, _tokenizer(config)))
    if kind == "json":
        print(to_json(plan))
        return 0
    model = config.model or config.arch.name
    print(f"stage={config.stage.name} data={config.data.name} model: {model}")
    _section("layout", plan.layout)
    _section("batch", plan.batch)
    _section("parameters", plan.parameters)
    _section("floating-point operations (forward and backward)", plan.flops, _flops)
    _section("memory per process (estimate)", plan.memory, _mib)
    _compare_with_machine(plan.memory["total"])
    return 0


def _plan_pipeline(config: Any) -> int:
    """Print one line per training stage. Parents do not exist yet, so each is taken to have the shape `arch`."""
    from dataclasses import replace
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from distllm.config.plan import make_plan
    from distllm.pipeline.run import job_config, plan_jobs

    table = Table("stage", "steps", "batch", "tokens at most", "FLOPs at most", "memory")
    for column in table.columns[1:]:
        column.justify = "right"
    for job in plan_jobs(config.pipeline, Path(config.run.dir)):
        stage = replace(job_config(config, job), model=None)
        if job.stage.kind != "train":
            table.add_row(job.folder.name, job.stage.kind, "", "", "", "")
            continue
        plan = make_plan(stage)
        tokens = plan.batch["tokens in all at most"]
        flops = tokens * plan.flops["per token, full attention"]
        table.add_row(
            job.folder.name,
            _plain(stage.train.max_steps),
            _plain(stage.train.global_batch_size),
            _plain(tokens),
            _flops(flops),
            _mib(plan.memory["total"]),
        )
    Console().print(table)
    return 0


def _tokenizer(config: Any) -> Any:
    from distllm.data.tokenizer import load_tokenizer

    folder = config.tokenizer or config.model
    return load_tokenizer(folder) if folder else None


def _section(title: str, rows: Mapping[str, Any], show: Any = None) -> None:
    print(f"\n{title}")
    for label, value in rows.items():
        print(f"  {label:<36} {(show or _plain)(value):>16}")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _flops(value: float) -> str:
    units = ["", "k", "M", "G", "T", "P", "E"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}FLOP"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _compare_with_machine(needed: int) -> None:
    from distllm.config.plan import available_bytes

    available = available_bytes()
    if available:
        fits = "fits in" if needed < available else "DOES NOT FIT in"
        print(
            f"\nThis {fits} the machine's {available / 2**30:.1f} GiB (Python and torch add about 0.5 GiB)."
        )
