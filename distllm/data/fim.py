"""Fill-in-the-middle: a share of the documents is cut in three and reordered, so that a causal model learns to fill gaps.

    prefix, suffix, middle:  <P> prefix <S> suffix <M> middle        suffix first:  <P> <S> suffix <M> prefix middle

Reference: Bavarian et al. 2022, arXiv 2207.14255, section 3: characters, whole documents, half of them each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from distllm.data.tokenizer import encode_texts
from distllm.data.vocabulary import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIM_TOKENS = (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX)


def encode_with_gaps(
    tok: PreTrainedTokenizerFast, texts: Sequence[str], rate: float, spm_rate: float, seed: int
) -> list[list[int]]:
    """Encode texts, a share `rate` of them reordered; which ones, and where they are cut, depends on seed and content.

    Raises:
        ConfigError: the tokenizer lacks one of the three marks.
    """
    vocabulary = Vocabulary(tok)
    prefix_id, middle_id, suffix_id = map(vocabulary.id_of, FIM_TOKENS)
    pieces: list[str] = []
    kinds = []
    for text in texts:
        rng = Random(f"{seed} {text}")
        if rng.random() >= rate:
            kinds.append("whole")
            pieces.append(text)
            continue
        first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
        kinds.append("suffix first" if rng.random() < spm_rate else "prefix first")
        pieces += [text[:first], text[first:second], text[second:]]
    encoded = iter(encode_texts(tok, pieces))
    found = []
    for kind in kinds:
        ids = next(encoded)
        if kind != "whole":
            prefix, middle, suffix = ids, next(encoded), next(encoded)
            if kind == "prefix first":
                ids = [prefix_id, *prefix, suffix_id, *suffix, middle_id, *middle]
            else:
                ids = [prefix_id, suffix_id, *suffix, middle_id, *prefix, *middle]
        found.append(ids)
    return found
