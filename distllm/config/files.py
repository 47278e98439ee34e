"""Where the YAML files are and which options they offer. Imports nothing heavy: `distllm list` needs no torch."""

import functools
from pathlib import Path

from distllm.errors import ConfigError

GROUPS = (
    "arch",
    "stage",
    "engine",
    "data",
    "optim",
    "schedule",
    "tracking",
    "hardware",
    "adapter",
    "pipeline",
)
"""Parts of the config with options to choose from: one folder of `conf/` each."""

CHOOSABLE = (*GROUPS, "experiment")
"""Words that are set to the name of a file: `arch=llama_tiny` reads conf/arch/llama_tiny.yaml."""


@functools.cache
def conf_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, or beside it in a checkout.

    Raises:
        ConfigError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"No conf/config.yaml in or beside {package}: the installation is incomplete."
    )


def matrix_file() -> Path:
    """Return where it is recorded which architecture has learned what in which stage (`distllm list matrix`)."""
    return conf_dir() / "matrix.json"


@functools.cache
def options_in(group: str) -> list[str]:
    """List the options of `group`: the names of its YAML files."""
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


def first_line(group: str, option: str) -> str:
    """Return what a YAML file says about itself: its first comment that is no instruction to Hydra."""
    for line in (conf_dir() / group / f"{option}.yaml").read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""
