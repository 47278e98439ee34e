"""Sets of token ids for models that give verdicts: texts with a class, words with tags, steps to judge, answers
to compare.

None of them needs a chat template; what stands around a text is in `text_layout.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distllm.data.datasets import Encoded, PairExample, PromptExample
from distllm.data.options import DataOptions
from distllm.data.text_layout import TextLayout, encode_words, plain_text
from distllm.data.tokenizer import encode_texts
from distllm.errors import DataError
from distllm.types import ComparedPair, Labelled, Pair, Prompt, Stepwise, Tagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


STEP_LABELS = ("wrong", "right")
"""Names of the labels 0 and 1 of a step."""


@dataclass(slots=True)
class LabelledExample:
    """One text or two, and their class."""

    first_ids: list[int]
    second_ids: list[int]
    """Empty where there is one text."""
    label: int
    sample_id: int


@dataclass(slots=True)
class TaggedExample:
    """A sentence; the first token of each word carries the word's tag."""

    input_ids: list[int]
    places: list[int]
    """[words]: the first token of each, -1 if no token shows the word."""
    tags: list[int]
    """[words]."""
    sample_id: int


def label_names(labels: Iterable[str | int | float]) -> list[str]:
    """List the classes that occur, numbers in their order, texts in the alphabet's.

    Raises:
        DataError: labels are fractions, or there is only one class.
    """
    found = set(labels)
    fractions = [v for v in found if isinstance(v, float) and not v.is_integer()]
    if fractions:
        raise DataError(
            f"The label {fractions[0]} is no class. stage=classify learns classes only."
        )
    whole = all(not isinstance(v, str) or v.lstrip("-").isdigit() for v in found)
    names = sorted({_name(v) for v in found}, key=(lambda n: (int(n), n)) if whole else str)
    if len(names) < 2:
        raise DataError(
            f"The data has one class only: {', '.join(names)}. There is nothing to learn."
        )
    return names


def _name(label: str | int | float) -> str:
    return label if isinstance(label, str) else str(int(label))


class _Verdicts(Encoded[Any]):
    """Records with labels out of `names`."""

    needs_template = False

    def __init__(
        self,
        records: Sequence[Any],
        tok: PreTrainedTokenizerFast,
        max_len: int,
        options: DataOptions | None = None,
        *,
        names: Sequence[str] = (),
    ) -> None:
        self.layout, self.names = TextLayout.of(tok), list(names)
        self.numbers = {name: number for number, name in enumerate(names)}
        super().__init__(records, tok, max_len, options)

    def number(self, label: str | int | float) -> int:
        """Return the number of a label."""
        name = _name(label)
        if name not in self.numbers:
            raise DataError(f"the label {name} is not among {', '.join(self.names)}.")
        return self.numbers[name]


class LabelledDataset(_Verdicts):
    """Texts or pairs of texts with their class, both texts together never longer than `max_len` tokens."""

    what = "text"

    def encode(self, record: Labelled, tok: PreTrainedTokenizerFast, index: int) -> LabelledExample:
        """Encode one text or two."""
        return LabelledExample(
            *self.layout.encode(tok, *record.texts), self.number(record.label), index
        )

    def length(self, example: LabelledExample) -> int:
        """Count both texts."""
        return len(example.first_ids) + len(example.second_ids)

    def cut(self, example: LabelledExample, max_len: int) -> LabelledExample | None:
        """Shorten the longer text at its end, token by token; what closes it stays."""
        sides = [example.first_ids, example.second_ids]
        kept = len(self.layout.closing)
        for _ in range(self.length(example) - max_len):
            long = max((0, 1), key=lambda n: len(sides[n]))
            end = len(sides[long]) - kept
            sides[long] = sides[long][: end - 1] + sides[long][end:]
        if any(0 < len(s) <= kept + len(self.layout.opening) for s in sides):
            return None
        return replace(example, first_ids=sides[0], second_ids=sides[1])


class TaggedDataset(_Verdicts):
    """Sentences with a tag for each word."""

    what = "sentence"

    def encode(self, record: Tagged, tok: PreTrainedTokenizerFast, index: int) -> TaggedExample:
        """Encode one sentence."""
        ids, firsts = encode_words(tok, record.tokens)
        laid, _ = self.layout.place(ids)
        shift = len(self.layout.opening)
        return TaggedExample(
            laid,
            [place + shift if place >= 0 else -1 for place in firsts],
            [self.number(tag) for tag in record.tags],
            index,
        )

    def length(self, example: TaggedExample) -> int:
        """Count all tokens."""
        return len(example.input_ids)


class JudgedDataset(_Verdicts):
    """Preference pairs for a judge that reads prompt and answer as two texts, without a chat template."""

    what = "pair"

    def encode(self, record: Pair, tok: PreTrainedTokenizerFast, index: int) -> PairExample:
        """Encode one pair."""
        if record.chosen == record.rejected:
            raise DataError(f"both answers are {record.chosen!r}; one must be better.")
        prompt = plain_text(record.prompt)
        first, chosen = self.layout.encode(tok, prompt, record.chosen)
        _, rejected = self.layout.encode(tok, prompt, record.rejected)
        return PairExample(
            first,
            chosen,
            rejected,
            record.kind,
            index,
            record.margin,
            record.confidence,
            record.objectives if isinstance(record, ComparedPair) else {},
        )

    def length(self, example: PairExample) -> int:
        """Count the prompt with the longer answer."""
        return len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids))


class ChoiceDataset(_Verdicts):
    """Texts to be answered with a label, for a policy that draws labels."""

    what = "text"

    def encode(self, record: Labelled, tok: PreTrainedTokenizerFast, index: int) -> PromptExample:
        """Encode one text or two; the right label's name is the answer."""
        first, second = self.layout.encode(tok, *record.texts)
        messages = [{"role": "user", "content": "\n".join(record.texts)}]
        prompt = Prompt(messages=messages, answer=self.names[self.number(record.label)])
        return PromptExample([*first, *second], prompt, index)

    def length(self, example: PromptExample) -> int:
        """Count all tokens."""
        return len(example.prompt_ids)


class StepDataset(_Verdicts):
    """Solutions as plain text, a line for the prompt's messages and for each step, whose last token carries its label."""

    what = "solution"

    def encode(self, record: Stepwise, tok: PreTrainedTokenizerFast, index: int) -> TaggedExample:
        """Encode one solution; every line by itself, so that a step's tokens do not depend on what follows."""
        lines = [plain_text(record.prompt), *record.steps]
        parts = encode_texts(tok, [f"{line}\n" for line in lines])
        ids, ends = list(parts[0]), []
        for part in parts[1:]:
            ids += part
            ends.append(len(ids) - 1)
        laid, _ = self.layout.place(ids)
        shift = len(self.layout.opening)
        return TaggedExample(
            laid, [end + shift for end in ends], [int(r) for r in record.right], index
        )

    def length(self, example: TaggedExample) -> int:
        """Count all tokens."""
        return len(example.input_ids)
