"""`distllm import`: reserved for reading foreign checkpoints; not available yet."""

from collections.abc import Sequence

from distllm.errors import ConfigError

HELP = """
usage: distllm import model=HF_DIR out=DIR

Not available yet. A Llama-like directory in Hugging Face layout needs no import: model=HF_DIR reads it as it is.
"""
OWN = {"out": "directory to write"}


def run(arguments: Sequence[str]) -> int:
    """Say so."""
    raise ConfigError(
        "`distllm import` is not available in this version; a Llama-like Hugging Face directory can be used as it is: "
        "model=HF_DIR."
    )
