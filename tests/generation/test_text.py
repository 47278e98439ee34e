"""Streaming text: pieces join to the whole, and no piece holds half a character."""

import pytest
from patched import with_bug

from distllm.data.tokenizer import train_tokenizer
from distllm.generation import text

STORY = "Grüße aus 東京 🎌👩‍👩‍👧 naïve café — ok\n\tЖ <|end|>"


@pytest.fixture(scope="module")
def tokenizer():
    """Trained on plain English, so that every other character is split into its bytes."""
    return train_tokenizer(["the cat sat on the mat and looked at the dog"] * 5, 280)


def check_stream(module, tokenizer):
    ids = tokenizer(STORY).input_ids
    assert len(ids) > len(STORY), "characters must be split over tokens for this to show anything"
    stream = module.TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(pieces)
    assert max(map(len, pieces)) <= 2, "text must not be held back longer than a character takes"


def test_stream(tokenizer):
    check_stream(text, tokenizer)
    for old, new in [
        ("if complete_only and text.endswith(_BROKEN):", "if False:"),
        ("if complete_only and text.endswith(_BROKEN):", "if complete_only:"),
        ("return text[len(known) :]", "return text"),
        ("skip_special_tokens=True", "skip_special_tokens=False"),
    ]:
        with pytest.raises(AssertionError):
            check_stream(with_bug(text, old, new), tokenizer)


def test_bytes_that_never_become_a_character(tokenizer):
    half = tokenizer("東").input_ids[:2]
    stream = text.TextStream(tokenizer)
    assert [stream.push(token) for token in half] == ["", ""]
    assert stream.push(tokenizer("a").input_ids[0]) == "\ufffda"
    assert [stream.push(token) for token in half] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_leading_spaces_survive_a_tokenizer_that_strips_them():
    """Like sentencepiece: a decoder that drops the space in front of the first word it is given."""

    class Stripping:
        words = ("▁one", "▁two", "▁three", "s")

        def decode(self, ids, skip_special_tokens):
            return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = text.TextStream(Stripping())
    assert [stream.push(i) for i in (0, 1, 2, 3)] == ["one", " two", " three", "s"]
