"""What objectives must know of a tokenizer: its special ids by name, and where words and sentences begin and end.

A table per token id, so that it can be asked about ids alone, long after the text is gone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from distllm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
"""T5's names for the gaps of a corrupted text; in its vocabulary they count down from the last id."""
CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"
SENTENCE_MASK, DOCUMENT_MASK = "[sMASK]", "[gMASK]"
START_OF_PIECE, END_OF_PIECE = "<|startofpiece|>", "<|endofpiece|>"
MODES = ("[NLU]", "[S2S]", "[NLG]")
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"

SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "encoder": (CLS, SEP, MASK),
    "encoder_decoder": (*MODES, *reversed(SENTINELS)),
    "glm": (CLS, MASK, SENTENCE_MASK, DOCUMENT_MASK, START_OF_PIECE, END_OF_PIECE),
}
"""Architecture -> what a tokenizer trained for it holds beside the usual special tokens, in the order of the ids."""

ROLES = {CLS: "cls_token", SEP: "sep_token", MASK: "mask_token"}
"""Tokens that have a place of their own in a Hugging Face tokenizer."""

_SPACE_MARKS = "Ġ▁Ċĉč \n\t\r"
"""How byte-level and SentencePiece vocabularies write white space."""
_SENTENCE_ENDS = ".!?。！？Ċ\n"  # noqa: RUF001


class Vocabulary:
    """Ids of one tokenizer by their meaning."""

    def __init__(self, tok: PreTrainedTokenizerFast) -> None:
        self._tok = tok
        self.size = len(tok)
        """Number of ids."""

    @property
    def eos_id(self) -> int | None:
        """Ends a text."""
        return self._named("eos_token_id")

    @property
    def pad_id(self) -> int:
        """Fills rectangles; masked everywhere."""
        pad = self._named("pad_token_id")
        return pad if pad is not None else (self.eos_id or 0)

    @property
    def opening(self) -> list[int]:
        """What an encoder's text begins with: the classification token, where there is one."""
        cls_id = self._named("cls_token_id")
        return [] if cls_id is None else [cls_id]

    @property
    def closing(self) -> list[int]:
        """What a text ends with: the separator, else the end token, where there is one."""
        sep_id = self._named("sep_token_id")
        ends = self.eos_id if sep_id is None else sep_id
        return [] if ends is None else [ends]

    @property
    def mask_id(self) -> int:
        """Stands in place of a hidden token.

        Raises:
            ConfigError: the tokenizer has none.
        """
        mask_id = self._named("mask_token_id")
        return self.id_of(MASK) if mask_id is None else mask_id

    def _named(self, attribute: str) -> int | None:
        """Read one of the tokenizer's own ids, of which transformers says too little to a type checker."""
        found = getattr(self._tok, attribute)
        return None if found is None else int(found)

    @functools.cached_property
    def sentinels(self) -> list[int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ...

        Raises:
            ConfigError: the tokenizer has none.
        """
        self.id_of(SENTINELS[0])
        known = self._tok.get_vocab()
        return [known[name] for name in SENTINELS if name in known]

    def id_of(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            ConfigError: the tokenizer has no token of that name.
        """
        found = self._tok.get_vocab().get(name)
        if found is None:
            raise ConfigError(
                f"The tokenizer has no token {name}, which this objective needs. Leave tokenizer out to train "
                "one that has, or make one by `distllm tokenizer` with this run's arch and stage."
            )
        return found

    def encode(self, name: str) -> list[int]:
        """Return the id of a special token, or the ids of its text where the tokenizer does not have it."""
        found = self._tok.get_vocab().get(name)
        if found is not None:
            return [found]
        return self._tok.encode(name, add_special_tokens=False)

    @functools.cached_property
    def plain_ids(self) -> np.ndarray:
        """Ids that stand for text, [num] int64: special tokens left out."""
        special = set(self._tok.all_special_ids) | {
            i for i, t in self._tok.added_tokens_decoder.items() if t.special
        }
        return np.array([i for i in range(self.size) if i not in special], dtype=np.int64)

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return [p or "" for p in self._tok.convert_ids_to_tokens(list(range(self.size)))]

    @functools.cached_property
    def _continues(self) -> np.ndarray:
        """[size] bool: the token may go on with a word that the token before has begun."""
        if type(self._tok.backend_tokenizer.model).__name__ == "WordPiece":
            return np.array([p.startswith("##") for p in self._pieces])
        return np.array([_is_letter(p[:1]) for p in self._pieces])

    @functools.cached_property
    def _open(self) -> np.ndarray:
        """[size] bool: a word may go on behind the token: it ends in a letter, or is the space before a word."""
        return np.array([_is_letter(p[-1:]) or p in ("Ġ", "▁") for p in self._pieces])

    @functools.cached_property
    def _ends_sentence(self) -> np.ndarray:
        return np.array([p[-1:] in _SENTENCE_ENDS and p != "" for p in self._pieces])

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Return the places in `ids` [seq] where a word begins, the first one 0.

        A word is a run of letters and digits; every other token stands alone.
        """
        goes_on = np.zeros(len(ids), dtype=bool)
        goes_on[1:] = self._continues[ids[1:]] & self._open[ids[:-1]]
        return np.flatnonzero(~goes_on)

    def sentence_starts(self, ids: np.ndarray) -> np.ndarray:
        """Return the places in `ids` [seq] where a sentence begins, the first one 0."""
        begins = np.ones(len(ids), dtype=bool)
        begins[1:] = self._ends_sentence[ids[:-1]] & ~self._ends_sentence[ids[1:]]
        return np.flatnonzero(begins)


def _is_letter(character: str) -> bool:
    return character.isalnum() and character not in _SPACE_MARKS
