"""A tokenizer with every special token that an objective may ask for, and what objectives read of a model."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from distllm.data import vocabulary as v
from distllm.data.tokenizer import train_tokenizer
from distllm.data.vocabulary import Vocabulary
from distllm.objectives.options import PretrainOptions

TEXT = (
    "The quick brown fox jumps over the lazy dog. Twelve boxers hunt Viktor across the dike! "
    "Is every sentence easy to find? A user asks a question and the assistant answers it.\n"
)


@dataclass
class Shape:
    """The part of a model's options that span corruption reads."""

    name: str = "encoder_decoder"
    decoder_start_id: int = 0


@pytest.fixture(scope="session")
def tok():
    """Return a small tokenizer whose sentinels count down from the last id, as T5's do."""
    special = [
        v.CLS, v.SEP, v.MASK, v.SENTENCE_MASK, v.DOCUMENT_MASK, v.START_OF_PIECE, v.END_OF_PIECE,
        *v.MODES, *reversed(v.SENTINELS),
    ]  # fmt: skip
    return train_tokenizer([TEXT] * 3, 520, special)


@pytest.fixture(scope="session")
def vocabulary(tok):
    """Return the tokenizer's special ids."""
    return Vocabulary(tok)


@pytest.fixture(scope="session")
def build(vocabulary):
    """Return a function that builds an objective for a model of which only the options exist."""

    def build(cls, seq_len=512, seed=0, evaluating=False, **options):
        return cls(
            PretrainOptions(**options),
            vocabulary,
            SimpleNamespace(options=Shape()),
            seq_len,
            seed=seed,
            evaluating=evaluating,
        )

    return build
