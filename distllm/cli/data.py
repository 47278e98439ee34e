"""`distllm data`: looks at a data source the way training will see it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distllm.cli.arguments import split
from distllm.errors import ConfigError
from distllm.registry import unknown_name

if TYPE_CHECKING:
    from distllm.data.source import Source

HELP = """
usage: distllm data inspect path=FILE [count=N] [data.columns={OURS:THEIRS,...}] [key=value ...]
       distllm data tokenize path=FILES tokenizer=DIR out=DIR [workers=N] [shard_tokens=N] [key=value ...]
       distllm data verify path=DIR
       distllm data stats data=DATA|path=FILE [tokenizer=DIR] [key=value ...]
       distllm data show data=DATA|path=FILE [count=N] [split=train|heldout] [tokenizer=DIR] [key=value ...]

`inspect` says what a file (folder, pattern, hub:ORG/NAME) is taken for, and which records cannot be used.
`tokenize` writes shards of token ids for data=shards, in parallel; started again with the same out it goes on where it
stopped. `verify` compares shards with their checksums.
`stats` counts records, characters and tokens. `show` prints samples; in dialogues, the tokens that are learned
from (assistant's answers) are green on a terminal and between [[ ]] elsewhere.

Examples:
  distllm data stats data=stdlib
  distllm data show data=skills count=3
  distllm data stats path=corpus.jsonl
  distllm data inspect path=pairs.jsonl.gz
  distllm data tokenize "path=corpus/*.jsonl.gz" tokenizer=runs/tokenizer out=shards/corpus data.on_bad_line=skip
  distllm data inspect path=gsm8k.jsonl "data.columns={prompt:question,completion:answer}"
"""
OWN = {
    "count": "records of each kind to show; default 2",
    "split": "train or heldout; default train",
    "path": "what to look at; in stats and show short for data=file data.path=FILE",
    "out": "tokenize: directory to write",
    "workers": "tokenize: processes; default all cores",
    "shard_tokens": "tokenize: tokens of a shard; default 134217728",
}

_VIEWS = {
    "inspect": ("path", "count"),
    "tokenize": ("path", "out", "workers", "shard_tokens"),
    "verify": ("path",),
    "stats": ("path",),
    "show": ("path", "count", "split"),
}
"""View -> the keys of `OWN` that it reads."""

_GREEN, _RED, _PLAIN = "\033[32m", "\033[31m", "\033[0m"


def run(arguments: Sequence[str]) -> int:
    """Print counts or samples."""
    given = split("data", arguments, OWN, names=", ".join(_VIEWS), max_names=1)
    view = given.names[0] if given.names else "stats"
    if view not in _VIEWS:
        raise ConfigError(unknown_name("view", view, _VIEWS))
    for key in given.own:
        if key not in _VIEWS[view]:
            raise ConfigError(
                f"`distllm data {view}` does not read {key}= (see `distllm data --help`)."
            )
    if view == "inspect":
        from distllm.cli import data_inspect

        return data_inspect.run(given)
    if view in ("tokenize", "verify"):
        from distllm.cli import data_tokenize

        return data_tokenize.run(given) if view == "tokenize" else data_tokenize.verify(given)
    count, side = given.integer("count", 2, least=0), given.own.get("split", "train")
    overrides = given.overrides
    if given.own.get("path") and not any(o.startswith("data=") for o in overrides):
        overrides = ["data=file", *overrides]

    from distllm.config.compose import compose
    from distllm.data.source import SPLITS, check_split, open_source
    from distllm.data.templates import set_chat_template

    check_split(side)
    config = compose(overrides, also_known=OWN)
    options = config.data
    if given.own.get("path"):
        options = replace(options, path=given.own["path"])
    source = open_source(options, config.run.seed)
    kinds = source.serves
    tokenizer = _tokenizer(config, source, kinds)
    if config.data.chat_template:
        set_chat_template(tokenizer, config.data.chat_template)
    print(f"data={options.name}, fingerprint {source.fingerprint()[:16]}")
    if view == "stats":
        _print_stats({f"{s} {k}": _texts(source, k, s) for k in kinds for s in SPLITS}, tokenizer)
        return 0
    for kind in kinds:
        print(f"\n{kind} ({side})")
        for record in getattr(source, kind)(side)[:count]:
            print(_show(record, tokenizer))
    return 0


def _tokenizer(config: Any, source: "Source", kinds: Sequence[str]) -> Any:
    """Take the configured tokenizer, or train one of arch.vocab_size, as training would."""
    from distllm.data.tokenizer import load_tokenizer, train_tokenizer

    folder = config.tokenizer or config.model
    if folder:
        return load_tokenizer(folder)
    texts = [t for kind in kinds for parts in _texts(source, kind, "train") for t in parts]
    print(f"No tokenizer=DIR given: one of {config.arch.vocab_size} is trained on these records.")
    return train_tokenizer(texts, config.arch.vocab_size, units=config.data.units)


def _texts(source: "Source", kind: str, side: str) -> list[list[str]]:
    """Return the texts of each record."""
    from distllm.data.rows import texts_of

    return [texts_of(record) for record in getattr(source, kind)(side)]


def _print_stats(groups: dict[str, list[list[str]]], tokenizer: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from distllm.data.tokenizer import encode_texts

    table = Table("records", "number", "characters", "tokens", "tokens per record: mean", "longest")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, records in groups.items():
        lengths = [sum(map(len, encode_texts(tokenizer, parts))) for parts in records]
        characters = sum(len(text) for parts in records for text in parts)
        mean = sum(lengths) / max(1, len(lengths))
        cells = (len(records), characters, sum(lengths), round(mean, 1), max(lengths, default=0))
        table.add_row(name, *(f"{cell:,}" for cell in cells))
    Console().print(table)
    print("Tokens are those of the texts; a chat template and end tokens come on top.")


def _show(record: Any, tokenizer: Any) -> str:
    from distllm.data.chat import encode_dialogue
    from distllm.types import (
        Dialogue,
        Document,
        Labelled,
        Pair,
        Parallel,
        Stepwise,
        Tagged,
        Unpaired,
    )

    match record:
        case Document():
            return f"- {record.name}\n{_indent(record.text[:600])}"
        case Dialogue():
            ids, mask = encode_dialogue(tokenizer, record.messages)
            learned = f"{sum(mask)} of {len(ids)} tokens learned from"
            return f"- {record.task} ({learned})\n{_indent(''.join(_runs(ids, mask, tokenizer)))}"
        case Labelled():
            return "\n".join([f"- {record.label}", *(_indent(text) for text in record.texts)])
        case Tagged():
            words = zip(record.tokens, record.tags, strict=True)
            return "- " + " ".join(f"{word}/{tag}" for word, tag in words)
        case Stepwise():
            judged = zip(record.steps, record.right, strict=True)
            steps = (_mark(step, _GREEN if right else _RED) for step, right in judged)
            asked = (f"{m['role']}: {m['content']}" for m in record.prompt)
            return "\n".join(["-", *map(_indent, (*asked, *steps))])
        case Parallel():
            return f"- source\n{_indent(record.source)}\n  target\n{_indent(record.target)}"
    messages = record.prompt if isinstance(record, Pair | Unpaired) else record.messages
    lines = [f"- {record.task}", *(_indent(f"{m['role']}: {m['content']}") for m in messages)]
    if isinstance(record, Pair):
        lines.append(_indent(f"chosen:   {_mark(record.chosen, _GREEN)}"))
        lines.append(_indent(f"rejected: {_mark(record.rejected, _RED)} {record.kind}"))
    elif isinstance(record, Unpaired):
        word, colour = ("good", _GREEN) if record.good else ("bad", _RED)
        lines.append(_indent(f"{word}: {_mark(record.completion, colour)}"))
    elif record.answer is not None:
        lines.append(_indent(f"answer: {_mark(record.answer, _GREEN)}"))
    return "\n".join(lines)


def _runs(ids: Sequence[int], mask: Sequence[bool], tokenizer: Any) -> Iterator[str]:
    """Decode stretches of equal mask; a token stands wholly inside or outside."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            text = tokenizer.decode(ids[start:i], skip_special_tokens=False)
            yield _mark(text, _GREEN) if mask[start] else text
            start = i


def _mark(text: str, colour: str) -> str:
    return f"{colour}{text}{_PLAIN}" if sys.stdout.isatty() else f"[[{text}]]"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
