"""`distllm tokenizer`: trains a tokenizer on the documents of a data source."""

from collections.abc import Sequence
from pathlib import Path

from distllm.cli.arguments import split

HELP = """
usage: distllm tokenizer data=DATA out=DIR [vocab_size=N] [key=value ...]

Byte-level BPE with a chat template, in Hugging Face layout; data.units=word or character makes words or characters tokens.
It holds the special tokens that the stage needs with the architecture: masks for arch=bert_tiny, sentinels for arch=t5_tiny.

Examples:
  distllm tokenizer data=stdlib vocab_size=4096 out=runs/tokenizer
  distllm tokenizer data=file data.path=corpus.txt vocab_size=8192 out=runs/tokenizer
  distllm tokenizer arch=bert_base data=file data.path=corpus.txt out=runs/tokenizer
"""
OWN = {
    "out": "directory to write; must be new or empty",
    "vocab_size": "number of tokens; default: arch.vocab_size",
}


def run(arguments: Sequence[str]) -> int:
    """Train, save, and report how well held-out text is compressed."""
    given = split("tokenizer", arguments, OWN)
    out = Path(given.required("tokenizer", "out"))

    from distllm.config.compose import compose
    from distllm.data.source import open_source
    from distllm.data.tokenizer import encode_texts, save_tokenizer, train_tokenizer
    from distllm.errors import ConfigError
    from distllm.pipeline.fitting import special_tokens

    config = compose(given.overrides, also_known=OWN)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"out={out} exists and is not an empty directory. Choose another, or remove it."
        )
    size = given.integer("vocab_size", config.arch.vocab_size)
    source = open_source(config.data, config.run.seed)
    tokenizer = train_tokenizer(
        source.texts() or (), size, special_tokens(config), config.data.units
    )
    save_tokenizer(tokenizer, out)
    heldout = [d.text for d in source.documents("heldout")] if "documents" in source.serves else []
    num_tokens = sum(map(len, encode_texts(tokenizer, heldout)))
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in heldout)
    ratio = f", {num_bytes / num_tokens:.2f} bytes per token on held-out text" if num_tokens else ""
    print(f"{out}: {len(tokenizer)} tokens{ratio}.")
    return 0
