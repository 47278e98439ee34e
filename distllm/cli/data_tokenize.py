"""`distllm data tokenize` and `distllm data verify`: a corpus to shards, and whether they are whole."""

import os
from dataclasses import replace
from pathlib import Path

from distllm.cli.arguments import Arguments
from distllm.errors import ConfigError

SHARD_TOKENS = 2**27


def run(given: Arguments) -> int:
    """Write the shards; 3 when a signal stopped it."""
    from distllm.cli.main import EXIT_DONE, EXIT_STOPPED
    from distllm.config.compose import compose
    from distllm.pipeline.tokenize import tokenize
    from distllm.train.signals import StopFlag

    out = Path(given.required("data tokenize", "out"))
    config = compose(
        ["data=file", *given.overrides], also_known=("path", "out", "workers", "shard_tokens")
    )
    options = config.data
    if given.own.get("path"):
        options = replace(options, path=given.own["path"])
    if not config.tokenizer:
        raise ConfigError(
            "`distllm data tokenize` needs tokenizer=DIR. Train one with: distllm tokenizer data=file "
            f"data.path={options.path} out=runs/tokenizer"
        )
    workers = given.integer("workers", len(os.sched_getaffinity(0)))
    with StopFlag() as stop:
        manifest = tokenize(
            options,
            config.tokenizer,
            out,
            num_workers=workers,
            shard_tokens=given.integer("shard_tokens", SHARD_TOKENS),
            stop=stop,
            say=print,
        )
    tokens, text_bytes = manifest.total("tokens"), manifest.total("text_bytes")
    if not manifest.is_complete:
        print(
            f"Stopped with {tokens:,} tokens in whole shards; run it again with the same out to go on."
        )
        return EXIT_STOPPED
    seconds = max(manifest.seconds, 1e-9)
    shards = sum(map(len, manifest.shards.values()))
    print(f"{out}: {shards} shards of {manifest.dtype.name}, tokenizer of {manifest.vocab_size:,}")
    print(f"  documents   {manifest.total('documents'):,}")
    print(f"  tokens      {tokens:,} (held out: {manifest.total('tokens', 'heldout'):,})")
    print(f"  bad records {manifest.bad + manifest.not_encoded:,}")
    print(
        f"  speed       {tokens / seconds:,.0f} tokens/s, {text_bytes / seconds / 1e6:.2f} MB/s of text with "
        f"{workers} processes"
    )
    print(f"Train on it: distllm train data=shards data.path={out}")
    return EXIT_DONE


def verify(given: Arguments) -> int:
    """Say whether all shards have their checksums."""
    from distllm.cli.main import EXIT_DONE
    from distllm.pipeline.tokenize import verify as verify_shards

    folder = Path(given.required("data verify", "path"))
    manifest = verify_shards(folder)
    state = "complete" if manifest.is_complete else "unfinished"
    count = sum(map(len, manifest.shards.values()))
    print(f"{folder}: {count} shards have their checksums; the tokenisation is {state}.")
    return EXIT_DONE
