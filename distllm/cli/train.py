"""`distllm train`: one stage, from its config to a model directory."""

from collections.abc import Sequence
from pathlib import Path

from distllm.cli.arguments import split

HELP = """
usage: distllm train [stage=STAGE] [data=DATA] [arch=ARCH] [model=DIR] [run.dir=DIR] [key=value ...]

Examples:
  distllm train run.dir=runs/base train.max_steps=200
  distllm train stage=sft data=skills model=runs/base/model run.dir=runs/sft
  distllm train stage=grpo data=skills model=runs/sft/model run.dir=runs/grpo optim.lr=1e-4

Started again with the same run.dir, a run goes on where it stopped. `distllm plan` takes the same settings and shows
what they lead to.
"""
OWN: dict[str, str] = {}


def run(arguments: Sequence[str]) -> int:
    """Run the stage; 3 when a signal stopped it after a clean save."""
    from distllm.train.signals import follow_launcher

    follow_launcher()
    given = split("train", arguments, OWN)

    from distllm.cli.main import EXIT_DONE, stopped_exit_code
    from distllm.config.checks import check_training
    from distllm.config.compose import compose
    from distllm.engines import processes
    from distllm.pipeline.stage import run_stage

    config = compose(given.overrides)
    check_training(config)
    result = run_stage(config)
    if not result.finished:
        return stopped_exit_code()
    if processes.rank() != 0:
        return EXIT_DONE
    width = max(map(len, result.metrics), default=0)
    for name, value in sorted(result.metrics.items()):
        print(
            f"  {name:<{width}}  {value:.4g}"
            if isinstance(value, float)
            else f"  {name:<{width}}  {value}"
        )
    print(f"Model: {result.run_dir / 'model'}\nReport: {_report(result.run_dir)}")
    return EXIT_DONE


def _report(folder: Path) -> str:
    """Write the report; a run that is complete does not fail for want of a plotting library."""
    from distllm.errors import UserError
    from distllm.tracking.report import write_report

    try:
        return str(write_report([folder], folder / "report.html"))
    except UserError as error:
        return f"none ({error})"
