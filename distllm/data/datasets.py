"""Sets of token ids for each stage, encoded and checked when built, before training starts."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from distllm.data.chat import encode_answer, encode_dialogue, encode_prompt
from distllm.data.mixture import Joined, Share, recount
from distllm.data.options import DataOptions, OnBadLine, OnLong
from distllm.data.packing import PackedDataset
from distllm.data.shards import ShardsSource
from distllm.data.source import Source
from distllm.data.templates import check_template
from distllm.data.tokenizer import encode_texts
from distllm.errors import ConfigError, DataError
from distllm.types import ComparedPair, Dialogue, Pair, Prompt, Unpaired

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(slots=True)
class ChatExample:
    """A dialogue to imitate."""

    input_ids: list[int]
    mask: list[bool]
    """[seq]: True on tokens the assistant says, its end of turn included (not shifted)."""
    sample_id: int


@dataclass(slots=True)
class PairExample:
    """Two answers to one prompt; each ends with the end-of-turn token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    kind: str
    sample_id: int
    margin: float = 0.0
    confidence: float = 1.0
    objectives: Mapping[str, float] = field(default_factory=dict)
    """Objective -> probability that the chosen answer is the better one by it; empty where none compares."""
    ref_logprobs: tuple[float, float] | None = None
    """Summed log-probabilities of both answers under a reference, where they were computed beforehand."""


@dataclass(slots=True)
class UnpairedExample:
    """One answer to a prompt, good or bad; it ends with the end-of-turn token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    good: bool
    sample_id: int
    other_ids: list[int] = field(default_factory=list)
    """An answer to another prompt, cut to fit; empty if nothing fits."""
    ref_logprobs: tuple[float] | None = None
    """Summed log-probability of the answer under a reference, where it was computed beforehand."""
    ref_other: float | None = None
    """The same of the other answer."""


@dataclass(slots=True)
class PromptExample:
    """A prompt to answer, the generation prompt included."""

    prompt_ids: list[int]
    prompt: Prompt
    sample_id: int


def text_rows(
    source: Source,
    tok: PreTrainedTokenizerFast,
    seq_len: int,
    split: str,
    encode: Callable[..., list[list[int]]] = encode_texts,
) -> PackedDataset | Joined:
    """Tokenise the documents of `split` and pack them into rows of `seq_len`.

    The parts of a weighted mixture share no row. `encode` turns (tokenizer, texts) into token ids.
    """
    if isinstance(source, ShardsSource):
        if encode is not encode_texts:
            raise ConfigError(
                "stage.fim_rate reorders texts, and data=shards holds tokens. Set stage.fim_rate=0 or data=file."
            )
        return source.rows(tok, seq_len, split)
    eos_id = cast("int | None", tok.eos_token_id)
    if eos_id is None:
        raise ConfigError(
            "The tokenizer has no eos_token, which must end each document. Set tokenizer=DIR to "
            "one that has."
        )
    documents = source.documents(split)
    if not documents:
        raise DataError(f"data={source.options.name} holds no document in split {split}.")
    pad_id = cast("int | None", tok.pad_token_id)

    def pack(part: Sequence[Any]) -> PackedDataset:
        texts = [document.text for document in part]
        return PackedDataset(
            encode(tok, texts),
            seq_len,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            num_bytes=sum(len(text.encode()) for text in texts),
        )

    shares: Sequence[Share] = getattr(documents, "shares", ())
    if not shares:
        return pack(documents)
    parts, at = [], 0
    for share in shares:
        parts.append((pack(documents[at : at + share.size]), share.weight))
        at += share.size
    return Joined(parts)


Example = TypeVar("Example", ChatExample, PairExample, UnpairedExample, PromptExample)


class Encoded(ABC, Generic[Example]):
    """Records as token ids, each checked; what cannot be used is refused, or left out on request."""

    what = "record"
    needs_template = True
    """Samples are written by the chat template."""

    def __init__(
        self,
        records: Sequence[Any],
        tok: PreTrainedTokenizerFast,
        max_len: int,
        options: DataOptions | None = None,
    ) -> None:
        """Encode all records.

        Args:
            records: of the kind that the class is about.
            tok: has a chat template.
            max_len: longest sample, in tokens.
            options: what to do with records that cannot be encoded or are too long; None refuses.

        Raises:
            DataError: a record cannot be used; it is named by its place in the file.
        """
        options = options or DataOptions()
        if self.needs_template:
            check_template(tok)
        self._examples: list[Example] = []
        self.records: list[Any] = []
        """What each sample was made of."""
        bad: list[str] = []
        long: list[str] = []
        counts = []
        for index, record in enumerate(records):
            name = record.place or f"{self.what} {index}"
            before = len(self._examples)
            try:
                found = self.encode(record, tok, len(self._examples))
            except DataError as error:
                if options.on_bad_line == OnBadLine.ERROR:
                    raise DataError(f"{name}: {error}") from error
                bad.append(f"{name}: {error}")
            else:
                length = self.length(found)
                if length <= max_len:
                    self._examples.append(found)
                elif options.on_long == OnLong.ERROR:
                    raise DataError(
                        f"{name} has {length} tokens, above the limit of {max_len}. Set "
                        f"train.seq_len={length} or more (and arch.max_seq_len no smaller), "
                        "data.on_long=skip, or remove it from the data."
                    )
                else:
                    long.append(f"{name} has {length}")
                    cut = self.cut(found, max_len) if options.on_long == OnLong.CUT else None
                    self._examples += [cut] if cut else []
            counts.append(len(self._examples) - before)
            self.records += [record] * counts[-1]
        self.shares = recount(getattr(records, "shares", ()), counts)
        """Parts of a weighted mixture."""
        self._report(len(records), bad, long, max_len, options)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    @abstractmethod
    def encode(self, record: Any, tok: PreTrainedTokenizerFast, index: int) -> Example:
        """Encode one record as sample `index`."""

    @abstractmethod
    def length(self, example: Example) -> int:
        """Return how many tokens a sample takes."""

    def cut(self, example: Example, max_len: int) -> Example | None:
        """Return what is left of a sample that is too long, or None if it is of no use."""
        return None

    def _report(
        self,
        num_records: int,
        bad: list[str],
        long: list[str],
        max_len: int,
        options: DataOptions,
    ) -> None:
        if bad:
            warnings.warn(
                f"{len(bad)} of {num_records} {self.what}s cannot be encoded and are left out "
                f"(data.on_bad_line=skip); the first is {bad[0]}",
                stacklevel=3,
            )
        if long:
            left_out = num_records - len(bad) - len(self._examples)
            warnings.warn(
                f"{len(long)} of {num_records} {self.what}s are longer than {max_len} tokens "
                f"(data.on_long={options.on_long}), of which {left_out} are left out; the "
                f"first is {long[0]}.",
                stacklevel=3,
            )
        if num_records and not self._examples:
            raise DataError(
                f"Of {num_records} {self.what}s none is left: {len(bad)} cannot be encoded, "
                f"{len(long)} are longer than {max_len} tokens. The first is {[*bad, *long][0]}."
            )


class ChatDataset(Encoded[ChatExample]):
    """Dialogues to imitate, none longer than `max_len` tokens."""

    what = "dialogue"

    def encode(self, record: Dialogue, tok: PreTrainedTokenizerFast, index: int) -> ChatExample:
        """Encode one dialogue."""
        ids, mask = encode_dialogue(tok, record.messages, record.learned)
        return ChatExample(ids, mask, index)

    def length(self, example: ChatExample) -> int:
        """Count all tokens."""
        return len(example.input_ids)

    def cut(self, example: ChatExample, max_len: int) -> ChatExample | None:
        """Keep the beginning, if something in it is learned from; no end of turn is made up."""
        ids, mask = example.input_ids[:max_len], example.mask[:max_len]
        return ChatExample(ids, mask, example.sample_id) if any(mask[1:]) else None


class PairDataset(Encoded[PairExample]):
    """Preference pairs, prompt and answer together never longer than `max_len` tokens."""

    what = "pair"

    def encode(self, record: Pair, tok: PreTrainedTokenizerFast, index: int) -> PairExample:
        """Encode one pair."""
        if record.chosen == record.rejected:
            raise DataError(f"both answers are {record.chosen!r}; one must be better.")
        return PairExample(
            encode_prompt(tok, record.prompt),
            encode_answer(tok, record.chosen),
            encode_answer(tok, record.rejected),
            record.kind,
            index,
            record.margin,
            record.confidence,
            record.objectives if isinstance(record, ComparedPair) else {},
        )

    def length(self, example: PairExample) -> int:
        """Count the prompt with the longer answer."""
        longer = max(len(example.chosen_ids), len(example.rejected_ids))
        return len(example.prompt_ids) + longer


class UnpairedDataset(Encoded[UnpairedExample]):
    """Answers judged good or bad, prompt and answer together never longer than `max_len` tokens."""

    what = "answer"

    def __init__(
        self,
        records: Sequence[Unpaired],
        tok: PreTrainedTokenizerFast,
        max_len: int,
        options: DataOptions | None = None,
    ) -> None:
        super().__init__(records, tok, max_len, options)
        count = len(self)
        if count < 2:
            raise DataError(
                "One answer alone cannot be judged: the answer to another prompt is needed to "
                "measure the divergence from the reference. Give at least 2."
            )
        # The two answers of a pair stand side by side, so the other one is taken from far away.
        for index, example in enumerate(self._examples):
            room = max_len - len(example.prompt_ids)
            other = self._examples[(index + count // 2) % count].completion_ids
            example.other_ids = other[:room] if len(other) > room else other

    def encode(self, record: Unpaired, tok: PreTrainedTokenizerFast, index: int) -> UnpairedExample:
        """Encode one answer."""
        prompt = encode_prompt(tok, record.prompt)
        return UnpairedExample(prompt, encode_answer(tok, record.completion), record.good, index)

    def length(self, example: UnpairedExample) -> int:
        """Count prompt and answer."""
        return len(example.prompt_ids) + len(example.completion_ids)


class PromptDataset(Encoded[PromptExample]):
    """Prompts to answer, none longer than `max_len` tokens (leave room for the response)."""

    what = "prompt"

    def encode(self, record: Prompt, tok: PreTrainedTokenizerFast, index: int) -> PromptExample:
        """Encode one prompt."""
        return PromptExample(encode_prompt(tok, record.messages), record, index)

    def length(self, example: PromptExample) -> int:
        """Count all tokens."""
        return len(example.prompt_ids)
