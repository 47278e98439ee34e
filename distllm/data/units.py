"""Tokenizers whose tokens are whole words or single characters, for comparisons with the literature's closed vocabularies.

What a run trains otherwise, byte-level BPE, is in `tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distllm.data.options import Units
from distllm.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "<unk>"
"""Stands for a word or character outside the vocabulary; WikiText spells it the same way."""


def closed_vocabulary(
    texts: Sequence[str], units: Units, vocab_size: int, special_tokens: Sequence[str]
) -> Tokenizer:
    """Number the words or characters of `texts`, the most frequent first, behind the special tokens.

    Words are what stands between spaces; a line's end is a word of its own. Words come back joined by single spaces,
    characters exactly as they were.

    Args:
        texts: to learn from.
        units: words or characters.
        vocab_size: number of tokens at most; rarer units become `UNKNOWN`.
        special_tokens: get the first ids.

    Raises:
        ConfigError: `vocab_size` has no room for more than the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [*special_tokens, UNKNOWN]
    if vocab_size <= len(special):
        raise ConfigError(
            f"vocab_size={vocab_size} leaves no room for {units}s beside {len(special)} special tokens. Set "
            f"{len(special) + 1} or more."
        )
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    if units == Units.WORD:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Split(Regex("[ \\t\\r]+"), "removed"),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
