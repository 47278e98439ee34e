"""`distllm report`: one HTML file with the plots of one or several runs."""

from collections.abc import Sequence
from pathlib import Path

from distllm.cli.arguments import split
from distllm.errors import ConfigError

HELP = """
usage: distllm report RUN [RUN ...] [out=FILE]

RUN is the directory of a run or of a pipeline.

Example:
  distllm report runs/demo out=demo.html
"""
OWN = {"out": "file to write; default: report.html in the first RUN"}


def run(arguments: Sequence[str]) -> int:
    """Write the report and print its path."""
    given = split("report", arguments, OWN, names="directories of runs", max_names=None)
    if not given.names:
        raise ConfigError("`distllm report` needs the directory of a run, such as runs/demo.")
    if given.overrides:
        raise ConfigError(
            f"`{given.overrides[0]}`: `distllm report` takes directories and out=FILE only."
        )
    runs = [Path(name) for name in given.names]
    for path in runs:
        if not path.is_dir():
            raise ConfigError(
                f"{path} is not a directory. Give the directory of a run, such as runs/demo."
            )

    from distllm.tracking.report import write_report

    print(write_report(runs, Path(given.own.get("out", runs[0] / "report.html"))))
    return 0
