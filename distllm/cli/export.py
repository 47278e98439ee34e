"""`distllm export`: a model directory that transformers loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distllm.cli.arguments import Arguments, split

HELP = """
usage: distllm export model=DIR out=DIR

Example:
  distllm export model=runs/demo/grpo/model out=my-model
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("my-model")'
"""
OWN = {"out": "directory to write; must be new or empty"}


def run(arguments: Sequence[str]) -> int:
    """Load the model and write it again."""
    return copy("export", split("export", arguments, OWN), OWN)


def copy(verb: str, given: Arguments, own: dict[str, str]) -> int:
    """Read the model directory `model=`, check it, and write it to `out=`, in the dtype it has."""
    out = Path(given.required(verb, "out"))

    from distllm.arch.io import load_model, save_model
    from distllm.config.compose import compose
    from distllm.data.chat import end_ids
    from distllm.data.tokenizer import check_fits
    from distllm.errors import ConfigError

    config = compose(given.overrides, also_known=own)
    if config.model is None:
        raise ConfigError(f"`distllm {verb}` needs model=DIR, such as model=RUN/model.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"out={out} exists and is not an empty directory. Choose another, or remove it."
        )
    model, tokenizer = load_model(config.model, dtype=None, arch=config.arch.name)
    if tokenizer is not None:
        check_fits(tokenizer, model.options.vocab_size)
    save_model(model, tokenizer, out, end_ids=end_ids(tokenizer) if tokenizer else ())
    print(_summary(out, model, tokenizer))
    return 0


def _summary(out: Path, model: Any, tokenizer: Any) -> str:
    from distllm.arch.io import read_config

    config = read_config(out)
    size = sum(f.stat().st_size for f in out.iterdir()) / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    words = "with its tokenizer" if tokenizer is not None else "without a tokenizer"
    readers = "transformers and distllm"
    if config["model_type"].startswith("distllm_") or model.head_name in ("value", "likelihood"):
        readers = "distllm only: transformers has no class for it"
    return (
        f"{out}: {config['model_type']}, {model.head_name} head, {parameters:,} parameters in "
        f"{config.get('dtype', 'float32')}, {size:.1f} MiB, {words}; readable by {readers}."
    )
