"""Special ids, words and sentences, told from token ids alone, for three kinds of tokenizer."""

import numpy as np
import pytest

from distllm.data.vocabulary import SENTINELS, Vocabulary
from distllm.errors import ConfigError


def test_sentinels_count_down_from_the_last_id(vocabulary):
    assert vocabulary.sentinels == [vocabulary.size - 1 - i for i in range(len(SENTINELS))]


def test_roles_are_those_of_the_tokenizer(tok, vocabulary):
    assert vocabulary.opening == [tok.cls_token_id] and vocabulary.closing == [tok.sep_token_id]
    assert vocabulary.mask_id == tok.mask_token_id
    special = set(tok.all_special_ids)
    assert special.isdisjoint(vocabulary.plain_ids.tolist())
    assert len(special) + len(vocabulary.plain_ids) == vocabulary.size


def test_words_are_runs_of_letters(tok, vocabulary):
    text = "The unquestionable fox, jumps2 over-the 12 dikes!"
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = np.array(encoded["input_ids"]), encoded["offset_mapping"]
    starts = vocabulary.word_starts(ids)
    words = [text[places[a][0] : places[b - 1][1]].strip() for a, b in _spans(starts, len(ids))]
    assert words == ["The", "unquestionable", "fox", ",", "jumps2", "over", "-", "the", "12", "dikes", "!"]  # fmt: skip
    assert len(words) < len(ids)


def test_sentences_end_with_their_mark(tok, vocabulary):
    text = "One fox jumps. Is it over? The end"
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = np.array(encoded["input_ids"]), encoded["offset_mapping"]
    found = [
        text[places[a][0] : places[b - 1][1]]
        for a, b in _spans(vocabulary.sentence_starts(ids), len(ids))
    ]
    assert found == ["One fox jumps.", " Is it over?", " The end"]


def test_word_pieces_are_joined_by_their_mark(tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "the", ",", "fox"]  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tok = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    ids = np.array(tok("the playings, fox", add_special_tokens=False)["input_ids"])
    assert Vocabulary(tok).word_starts(ids).tolist() == [0, 1, 4, 5]


def test_a_missing_token_is_named(tmp_path):
    from distllm.data.tokenizer import train_tokenizer

    bare = Vocabulary(train_tokenizer(["a text"], 300))
    with pytest.raises(ConfigError, match="<extra_id_0>"):
        _ = bare.sentinels
    with pytest.raises(ConfigError, match=r"\[MASK\]"):
        _ = bare.mask_id


def _spans(starts, end):
    return list(zip(starts, [*starts[1:], end], strict=True))
