"""`distllm pipeline`: stages chained into rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from distllm.cli.arguments import split

HELP = """
usage: distllm pipeline pipeline=NAME [run.dir=DIR] [pipeline.rounds=N] [key=value ...]

Example:
  distllm pipeline pipeline=demo run.dir=runs/demo

Started again with the same run.dir, a pipeline goes on at the unfinished stage. `distllm list pipeline` shows which
pipelines there are.
"""
OWN: dict[str, str] = {}


def run(arguments: Sequence[str]) -> int:
    """Run the stages; 3 when a signal stopped one after a clean save."""
    from distllm.train.signals import follow_launcher

    follow_launcher()
    given = split("pipeline", arguments, OWN)

    from distllm.cli.main import EXIT_DONE, stopped_exit_code
    from distllm.config.checks import machine_problems
    from distllm.config.compose import compose
    from distllm.config.files import options_in
    from distllm.config.overrides import raise_all
    from distllm.engines import processes
    from distllm.errors import ConfigError

    config = compose(given.overrides)
    if not config.pipeline.stages:
        known = [name for name in options_in("pipeline") if name != "none"]
        raise ConfigError(
            f"pipeline={config.pipeline.name} has no stages. Set pipeline=NAME, one of: {', '.join(known)}."
        )
    raise_all(machine_problems(config))

    from distllm.pipeline.run import run_pipeline

    result = run_pipeline(config)
    if not result.finished:
        return stopped_exit_code()
    if processes.rank() != 0:
        return EXIT_DONE
    _print_table(result.table)
    print(f"Report: {result.report}\nModels: {result.run_dir}/STAGE/model")
    return EXIT_DONE


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what each stage reached beside its bar; a missed bar is shown as missed."""
    from distllm.tracking.console import print_table

    verdicts = {True: "reached", False: "MISSED", None: ""}
    print_table(
        "What each stage reached",
        ("stage", "metric", "before", "after", "bar", "", "note"),
        [
            (
                row["stage"],
                row["metric"],
                *("" if row[k] is None else f"{row[k]:.4g}" for k in ("before", "after")),
                row["bar"],
                verdicts[row["ok"]],
                row["note"],
            )
            for row in rows
        ],
    )
