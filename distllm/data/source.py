"""What every source offers, and how to open one by name. Each source is a file of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields

from distllm.data.options import DataOptions
from distllm.errors import ConfigError
from distllm.registry import get
from distllm.types import (
    ComparedPair,
    Dialogue,
    Document,
    Labelled,
    Pair,
    Parallel,
    Prompt,
    Record,
    Stepwise,
    Tagged,
    Unpaired,
)

SPLITS = ("train", "heldout")
"""The two sides of every source; no content is on both."""

KINDS = {
    "documents": "stage=pretrain",
    "dialogues": "stage=sft",
    "pairs": "stage=reward or stage=dpo",
    "compared": "stage=multi_reward",
    "unpaired": "stage=kto",
    "prompts": "stage=ppo or stage=grpo",
    "labelled": "stage=classify",
    "tagged": "stage=tag",
    "stepwise": "stage=process",
    "parallel": "stage=sft of an encoder-decoder",
}
"""What a source may serve -> the stages that learn from it."""


class Source:
    """Base of all sources. Asked for what it does not serve, a source says what it does serve."""

    Options = DataOptions
    serves: tuple[str, ...] = ()
    """Which of `KINDS` this source offers."""
    checkable: bool = False
    """Whether every prompt has an answer that a rule can check (SFT then reports exact match)."""

    tokenizer_dir: str = ""
    """The tokenizer that the records are already encoded with; empty where they are texts."""

    def __init__(self, options: DataOptions, seed: int) -> None:
        self.options = options
        self.seed = seed

    def documents(self, split: str) -> list[Document]:
        """Return the texts of `split` (`train` or `heldout`)."""
        raise self.cannot_serve("documents")

    def dialogues(self, split: str) -> list[Dialogue]:
        """Return the conversations of `split`, each ending with the assistant's answer."""
        raise self.cannot_serve("dialogues")

    def pairs(self, split: str) -> list[Pair]:
        """Return the preference pairs of `split`."""
        raise self.cannot_serve("pairs")

    def compared(self, split: str) -> list[ComparedPair]:
        """Return the pairs of `split` that several objectives compare."""
        raise self.cannot_serve("compared")

    def prompts(self, split: str) -> list[Prompt]:
        """Return the prompts of `split`."""
        raise self.cannot_serve("prompts")

    def unpaired(self, split: str) -> list[Unpaired]:
        """Return single answers of `split`, each judged good or bad; a pair gives one of each."""
        if "unpaired" not in self.serves or "pairs" not in self.serves:
            raise self.cannot_serve("unpaired")
        return [answer for pair in self.pairs(split) for answer in both_answers(pair)]

    def labelled(self, split: str) -> list[Labelled]:
        """Return the texts of `split` with their classes."""
        raise self.cannot_serve("labelled")

    def tagged(self, split: str) -> list[Tagged]:
        """Return the sentences of `split` with a tag for each word."""
        raise self.cannot_serve("tagged")

    def stepwise(self, split: str) -> list[Stepwise]:
        """Return the solutions of `split` with a verdict for each step."""
        raise self.cannot_serve("stepwise")

    def parallel(self, split: str) -> list[Parallel]:
        """Return the texts of `split` with what each is to become."""
        raise self.cannot_serve("parallel")

    def texts(self) -> list[str] | None:
        """Return the texts that a tokenizer may be trained on; None where there are too few to learn a language."""
        return [d.text for d in self.documents("train")] if "documents" in self.serves else None

    def verify(self, part: int, parts: int) -> None:
        """Look for damage that only reading everything finds, in one of `parts` shares of it."""

    def fingerprint(self) -> str:
        """Hash everything this source serves (sha256, hex)."""
        records: list[Record] = []
        for kind in self.serves:
            for split in SPLITS:
                records += getattr(self, kind)(split)
        return records_fingerprint(records)

    def cannot_serve(self, kind: str) -> ConfigError:
        """Word the error for a kind of record this source lacks."""
        name = self.options.name
        can = " and ".join(f"{k} ({KINDS[k]})" for k in self.serves) or "nothing"
        return ConfigError(
            f"data={name} serves {can}; {kind} ({KINDS[kind]}) were asked for. Set data=stdlib for "
            "documents, data=skills for dialogues, pairs and prompts, or data=file data.path=FILE "
            f"with columns that hold {kind}."
        )


def both_answers(pair: Pair) -> list[Unpaired]:
    """Return the chosen answer as a good one and the rejected as a bad one."""
    return [
        Unpaired(prompt=pair.prompt, completion=text, good=good, task=pair.task, place=pair.place)
        for text, good in ((pair.chosen, True), (pair.rejected, False))
    ]


def final_answer(text: str, marker: str) -> str:
    """Return what stands behind the last `marker`, or all of a text that has none."""
    return text.rpartition(marker)[2].strip() if marker else text


def open_source(options: DataOptions, seed: int) -> Source:
    """Build the source that `options.name` names."""
    return get("data", options.name)(options, seed)


def check_split(split: str) -> None:
    """Refuse a split other than `train` and `heldout`."""
    if split not in SPLITS:
        raise ConfigError(f"split={split} is unknown. Known: {', '.join(SPLITS)}.")


def check_fraction(fraction: float) -> None:
    """Refuse a share outside [0, 1)."""
    if not 0 <= fraction < 1:
        raise ConfigError(
            f"data.heldout_fraction={fraction} is not in [0, 1). Set 0.05 to hold out about 5%."
        )


def hash_share(key: str) -> float:
    """Map `key` to a number in [0, 1) by its hash: the same on every machine, whatever the seed."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def heldout_flags(keys: Sequence[str], fraction: float) -> list[bool]:
    """Say for each key whether its content is held out.

    A key is held out when its hash falls below `fraction`. If none does, and there are at least two
    different keys, the one with the lowest hash is, so that a small file still has something to
    evaluate on.
    """
    check_fraction(fraction)
    shares = [hash_share(key) for key in keys]
    flags = [share < fraction for share in shares]
    if fraction > 0 and not any(flags) and len(set(shares)) > 1:
        lowest = min(shares)
        flags = [share == lowest for share in shares]
    return flags


def records_fingerprint(records: Iterable[Record]) -> str:
    """Hash records in order (sha256, hex)."""
    digest = hashlib.sha256()
    for record in records:
        values = {f.name: getattr(record, f.name) for f in fields(record) if f.compare}
        line = json.dumps([type(record).__name__, values], sort_keys=True, default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
