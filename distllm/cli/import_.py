"""`distllm import`: check a foreign checkpoint and write it as one of ours: one safetensors file, every setting spelled out."""

from collections.abc import Sequence

from distllm.cli.arguments import split

HELP = """
usage: distllm import model=HF_DIR out=DIR

Reads a Hugging Face directory, checks names and shapes of all tensors against its config.json and its tokenizer against
the vocabulary, and writes it anew; the dtype stays. A pickle (pytorch_model.bin) becomes safetensors if it holds tensors
only. Not needed before training: model=HF_DIR reads such a directory as it is.

Example:
  distllm import model=downloads/Qwen3-0.6B out=models/qwen3
"""
OWN = {"out": "directory to write; must be new or empty"}


def run(arguments: Sequence[str]) -> int:
    """Load the model and write it again."""
    from distllm.cli.export import copy

    return copy("import", split("import", arguments, OWN), OWN)
