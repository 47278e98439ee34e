"""Plain texts and pairs of texts as token ids, for models that read them without a chat template.

    [CLS] a [SEP]        [CLS] a [SEP] b [SEP]        <s> a </s> </s> b </s>

What stands around and between is the tokenizer's own, or, where it has no rule, its classification token (if any), its
separator and its end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distllm.data.backends import Backends
from distllm.data.tokenizer import encode_texts
from distllm.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TextLayout:
    """Special ids around texts."""

    opening: list[int]
    closing: list[int]
    between: list[int]
    """Further ids before a second text."""

    @classmethod
    def of(cls, tok: PreTrainedTokenizerFast) -> TextLayout:
        """Read the layout off the tokenizer."""
        vocabulary = Vocabulary(tok)
        opening, closing = vocabulary.opening, vocabulary.closing
        first, second = (tok.encode(text, add_special_tokens=False) for text in ("a", "b"))
        both = tok("a", "b")["input_ids"]
        around = len(both) - len(first) - len(second)  # type: ignore[arg-type]
        gap = around - len(opening) - 2 * len(closing)
        return cls(opening, closing, closing * max(gap, 0))

    def place(
        self, first: Sequence[int], second: Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Return (first text with what stands around it, second text with what stands around it or nothing)."""
        laid = [*self.opening, *first, *self.closing]
        if second is None:
            return laid, []
        return laid, [*self.between, *second, *self.closing]

    def encode(
        self, tok: PreTrainedTokenizerFast, first: str, second: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode one or two texts; special tokens that they spell out stay characters."""
        ids = encode_texts(tok, [first] if second is None else [first, second])
        return self.place(*ids)


def encode_words(tok: PreTrainedTokenizerFast, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Encode words with a space between.

    Returns:
        (ids, for each word the place of the token that its first character is in, -1 if no token shows it).
    """
    known = Backends.of(tok)
    plain = known.guarded(known.special, stand_ins=False)
    text = " ".join(words)
    found = plain.tokenizer.encode(text, add_special_tokens=False)
    ids = [plain.real.get(token, token) for token in found.ids]
    owners = [-1] * len(text)
    for place, (start, stop) in enumerate(found.offsets):
        for character in range(start, stop):
            if owners[character] < 0:
                owners[character] = place
    firsts, at = [], 0
    for word in words:
        firsts.append(owners[at] if word else -1)
        at += len(word) + 1
    return ids, firsts


def plain_text(messages: Sequence[dict[str, str]]) -> str:
    """Write a conversation as text: what is said, a line each."""
    return "\n".join(m["content"] for m in messages)
