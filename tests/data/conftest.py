"""Tokenizers of several kinds, small enough to be trained for each session."""

import pytest

from distllm.data.tokenizer import train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog while 42 cats sleep.",
    "Reverse the words: one two three four five. Sorted letters are easy to check.",
    "A user asks a question and the assistant answers it. System prompts come first.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好, 世界! 🎉",
] * 3


@pytest.fixture(scope="session")
def texts():
    """A few sentences."""
    return TEXTS


@pytest.fixture(scope="session")
def tok():
    """Our own tokenizer, small."""
    return train_tokenizer(TEXTS, 400)
