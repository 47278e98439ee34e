"""`distllm plan`: what a run would be, in numbers, without starting it."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from distllm.cli.arguments import split

HELP = """
usage: distllm plan [the settings of distllm train]
       distllm plan pipeline=NAME [the settings of distllm pipeline]

Prints batch arithmetic, parameters per part, FLOPs per token and memory per process; with hardware=PRESET also what a
step sends, how long it takes, and, when it does not fit, the cheapest change that makes it fit. For a pipeline, one
line per stage. Starts nothing, writes nothing.

Examples:
  distllm plan train.seq_len=512 train.global_batch_size=64
  distllm plan hardware=64xh100 engine=fsdp arch=llama3_8b engine.mesh.tp_size=8 train.seq_len=8192
  distllm plan stage=ppo data=skills model=runs/sft/model
"""
OWN = {"format": "table (default) or json"}


def run(arguments: Sequence[str]) -> int:
    """Print the plan."""
    given = split("plan", arguments, OWN)

    from distllm.config.checks import check, check_training
    from distllm.config.compose import compose
    from distllm.config.plan import count_epochs, make_plan, planned_dp_size, to_json
    from distllm.engines.cluster import ClusterOptions
    from distllm.errors import ConfigError
    from distllm.registry import unknown_name

    kind = given.own.get("format", "table")
    if kind not in ("table", "json"):
        raise ConfigError(unknown_name("format", kind, ("table", "json")))
    config = compose(given.overrides, also_known=OWN, check=False)
    if config.pipeline.stages:
        check(config)
        return _plan_pipeline(config)
    asked = config.train.global_batch_size
    is_elsewhere = isinstance(config.hardware, ClusterOptions)
    if is_elsewhere:  # this machine's devices, packages and data say nothing about that one
        if not any(w.lstrip("+").startswith("train.global_batch_size=") for w in given.overrides):
            config = _with_a_batch_for_all(config, planned_dp_size(config))
        check(config, planned_dp_size(config))
    else:
        check_training(config)
    plan = make_plan(config)
    if config.train.global_batch_size != asked:
        print(
            f"train.global_batch_size={asked} is no multiple of micro_batch_size ({config.train.micro_batch_size}) x "
            f"{planned_dp_size(config):,} processes, and the command does not set it: "
            f"{config.train.global_batch_size:,} is planned with.\n",
            file=sys.stderr,
        )
    if not is_elsewhere:
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
    _section("memory per process (predicted, each class at its worst)", plan.memory, _bytes)
    if plan.communication:
        _transfers(plan.communication)
    if plan.time:
        _times(plan.time)
    _fit(plan.fit, "a GPU" if is_elsewhere else "this machine")
    return 0


def _with_a_batch_for_all(config: Any, dp_size: int) -> Any:
    """Return the config with its batch rounded up to whole micro-batches on every process."""
    from dataclasses import replace

    train = config.train
    unit = train.micro_batch_size * dp_size
    if unit <= 0 or train.global_batch_size % unit == 0:
        return config
    size = -(-train.global_batch_size // unit) * unit
    return replace(config, train=replace(train, global_batch_size=size))


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
            _bytes(plan.memory["peak"]),
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


def _bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1000:,.2f} ms"


def _transfers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what one process receives per step, and how much of it the arithmetic hides."""
    print("\ncommunication per step and process (predicted)")
    print(
        f"  {'':<36} {'processes':>9} {'received':>11} {'time':>10} {'exposed':>10}  hidden behind"
    )
    for row in rows:
        hidden = "nothing" if row["exposed_s"] == row["seconds"] else row["phase"]
        print(
            f"  {row['what']:<36} {row['processes']:>9,} {_bytes(row['bytes']):>11} "
            f"{_seconds(row['seconds']):>10} {_seconds(row['exposed_s']):>10}  {hidden}"
        )


def _times(rows: Mapping[str, float]) -> None:
    print("\nstep time (predicted; how far to trust it: docs/plan.md)")
    for label, value in rows.items():
        if label.startswith("MFU"):
            shown = f"{value:.1%}"
        elif label.startswith("tokens"):
            shown = f"{value:,.0f}"
        else:
            shown = f"{value:,.2f} h" if label.startswith("hours") else _seconds(value)
        print(f"  {label:<36} {shown:>16}")


def _fit(fit: Mapping[str, Any], where: str) -> None:
    print(f"\nThe peak is at: {fit['peak at']}.")
    if fit["available"] is None:
        return
    room = f"{fit['available'] / 2**30:.1f} GiB"
    if fit["fits"]:
        print(f"It fits in the {room} that {where} has for tensors.")
        return
    print(f"It DOES NOT FIT in the {room} that {where} has for tensors.")
    if fit.get("change"):
        faster = "faster" if fit["then slower by"] < 0 else "slower"
        print(
            f"The cheapest change that makes it fit ({_bytes(fit['then peak'])}, GPU time per token "
            f"{abs(fit['then slower by']):.0%} {faster}):\n  {fit['change']}"
        )
    elif "change" in fit:
        print(
            "No change of checkpointing, micro-batch, sharding, tensor parallel or GPUs makes it fit."
        )
