"""Sets of token ids for each stage, encoded and checked when built, before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from distllm.data.chat import encode_answer, encode_dialogue, encode_prompt
from distllm.data.packing import PackedDataset
from distllm.data.source import Source
from distllm.data.tokenizer import encode_texts
from distllm.errors import ConfigError, DataError
from distllm.types import Dialogue, Pair, Prompt

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


@dataclass(slots=True)
class PromptExample:
    """A prompt to answer, the generation prompt included."""

    prompt_ids: list[int]
    prompt: Prompt
    sample_id: int


def text_rows(
    source: Source, tok: PreTrainedTokenizerFast, seq_len: int, split: str
) -> PackedDataset:
    """Tokenise the documents of `split` and pack them into rows of `seq_len`."""
    eos_id = cast("int | None", tok.eos_token_id)
    if eos_id is None:
        raise ConfigError(
            "The tokenizer has no eos_token, which must end each document. Set tokenizer=DIR to "
            "one that has."
        )
    texts = [document.text for document in source.documents(split)]
    if not texts:
        raise DataError(f"data={source.options.name} holds no document in split {split}.")
    pad_id = cast("int | None", tok.pad_token_id)
    return PackedDataset(
        encode_texts(tok, texts),
        seq_len,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        num_bytes=sum(len(text.encode()) for text in texts),
    )


class ChatDataset:
    """Dialogues to imitate, none longer than `max_len` tokens."""

    def __init__(
        self, dialogues: Sequence[Dialogue], tok: PreTrainedTokenizerFast, max_len: int
    ) -> None:
        self._examples: list[ChatExample] = []
        for index, dialogue in enumerate(dialogues):
            try:
                ids, mask = encode_dialogue(tok, dialogue.messages)
            except DataError as error:
                raise DataError(f"dialogue {index}: {error}") from error
            _check_length("dialogue", index, len(ids), max_len)
            self._examples.append(ChatExample(ids, mask, index))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ChatExample:
        return self._examples[index]


class PairDataset:
    """Preference pairs, prompt and answer together never longer than `max_len` tokens."""

    def __init__(self, pairs: Sequence[Pair], tok: PreTrainedTokenizerFast, max_len: int) -> None:
        self._examples: list[PairExample] = []
        for index, pair in enumerate(pairs):
            try:
                if pair.chosen == pair.rejected:
                    raise DataError(f"both answers are {pair.chosen!r}; one must be better.")
                prompt = encode_prompt(tok, pair.prompt)
                chosen = encode_answer(tok, pair.chosen)
                rejected = encode_answer(tok, pair.rejected)
            except DataError as error:
                raise DataError(f"pair {index}: {error}") from error
            _check_length("pair", index, len(prompt) + max(len(chosen), len(rejected)), max_len)
            self._examples.append(PairExample(prompt, chosen, rejected, pair.kind, index))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> PairExample:
        return self._examples[index]


class PromptDataset:
    """Prompts to answer, none longer than `max_len` tokens (leave room for the response)."""

    def __init__(
        self, prompts: Sequence[Prompt], tok: PreTrainedTokenizerFast, max_len: int
    ) -> None:
        self._examples: list[PromptExample] = []
        for index, prompt in enumerate(prompts):
            try:
                ids = encode_prompt(tok, prompt.messages)
            except DataError as error:
                raise DataError(f"prompt {index}: {error}") from error
            _check_length("prompt", index, len(ids), max_len)
            self._examples.append(PromptExample(ids, prompt, index))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> PromptExample:
        return self._examples[index]


def _check_length(what: str, index: int, length: int, limit: int) -> None:
    """Refuse a sample that would have to be cut."""
    if length > limit:
        raise DataError(
            f"{what} {index} has {length} tokens, above the limit of {limit}. Set "
            f"train.seq_len={length} or more (and arch.max_seq_len no smaller), or remove it from "
            "the data."
        )
