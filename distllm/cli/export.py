"""`distllm export`: a model directory that transformers loads."""

from collections.abc import Sequence
from pathlib import Path

from distllm.cli.arguments import split

HELP = """
usage: distllm export model=DIR out=DIR

Example:
  distllm export model=runs/demo/grpo/model out=my-model
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("my-model")'
"""
OWN = {"out": "directory to write; must be new or empty"}


def run(arguments: Sequence[str]) -> int:
    """Load the model and write it again."""
    given = split("export", arguments, OWN)
    out = Path(given.required("export", "out"))

    from distllm.arch.io import load_model, save_model
    from distllm.config.compose import compose
    from distllm.data.chat import end_ids
    from distllm.errors import ConfigError

    config = compose(given.overrides, also_known=OWN)
    if config.model is None:
        raise ConfigError("`distllm export` needs model=DIR, such as model=RUN/model.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"out={out} exists and is not an empty directory. Choose another, or remove it."
        )
    model, tokenizer = load_model(config.model)
    save_model(model, tokenizer, out, end_ids=end_ids(tokenizer) if tokenizer else ())
    size = sum(f.stat().st_size for f in out.iterdir())
    print(
        f"{out}: {model.head_name} head, {size / 2**20:.1f} MiB, readable by transformers and distllm."
    )
    return 0
