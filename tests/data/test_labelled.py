"""Texts with classes and words with tags as token ids, against transformers' own encoding."""

import pytest
from transformers import BertTokenizerFast

from distllm.data.labelled import (
    ChoiceDataset,
    JudgedDataset,
    LabelledDataset,
    TaggedDataset,
    label_names,
)
from distllm.data.options import DataOptions, OnLong
from distllm.data.text_layout import TextLayout, encode_words
from distllm.data.tokenizer import train_tokenizer
from distllm.data.vocabulary import CLS, MASK, SEP
from distllm.errors import DataError
from distllm.types import Labelled, Pair, Tagged

WORDS = ["the", "play", "##ing", "##s", "fox", ",", "new", "york", "a", "b", "c"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    return BertTokenizerFast(str(folder / "vocab.txt"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, tok):
    """Return a tokenizer that frames texts as RoBERTa does, over our vocabulary."""
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer(["a b c new york"] * 3, 300, ["<s>", "</s>"]).backend_tokenizer
    ids = [backend.token_to_id(t) for t in ("<s>", "</s>")]
    backend.post_processor = RobertaProcessing(("</s>", ids[1]), ("<s>", ids[0]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<|pad|>",
    )


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(["a b c new york fox"] * 3, 300, [CLS, SEP, MASK])


@pytest.mark.parametrize("which", ["bert", "roberta", "ours"])
def test_texts_are_framed_as_the_tokenizer_frames_them(which, request):
    tok = request.getfixturevalue(which)
    layout = TextLayout.of(tok)
    first, second = layout.encode(tok, "a b")
    assert first == tok("a b")["input_ids"] and second == []
    first, second = layout.encode(tok, "a b", "c")
    assert first + second == tok("a b", "c")["input_ids"]
    types = tok("a b", "c", return_token_type_ids=True)["token_type_ids"]
    if any(types):
        assert types == [0] * len(first) + [1] * len(second)


def test_a_tokenizer_trained_for_pairs_tells_them_apart(ours, tmp_path):
    """Who encodes a pair without us (a reward model's own tokenizer) must get the types that training had."""
    from distllm.data.tokenizer import load_tokenizer, save_tokenizer

    save_tokenizer(ours, tmp_path)
    for tok in (ours, load_tokenizer(tmp_path)):
        encoded = tok("a b", "c")
        first, second = TextLayout.of(tok).encode(tok, "a b", "c")
        assert encoded["token_type_ids"] == [0] * len(first) + [1] * len(second)


def test_typed_special_tokens_stay_text(ours):
    (first, _) = TextLayout.of(ours).encode(ours, "a [SEP] b")
    assert first.count(ours.sep_token_id) == 1


def test_labels_are_numbered(bert):
    records = [Labelled(texts=["a"], label="pos"), Labelled(texts=["b", "c"], label="neg")]
    names = label_names(r.label for r in records)
    assert names == ["neg", "pos"]
    rows = LabelledDataset(records, bert, 8, names=names)
    assert [r.label for r in (rows[0], rows[1])] == [1, 0]
    assert rows[1].first_ids + rows[1].second_ids == bert("b", "c")["input_ids"]
    assert label_names([10, 9, 2]) == ["2", "9", "10"]
    with pytest.raises(DataError, match="label odd is not among neg, pos"):
        LabelledDataset([Labelled(texts=["a"], label="odd")], bert, 8, names=names)
    with pytest.raises(DataError, match=r"0\.5 is no class"):
        label_names([0.5, 1.0])
    with pytest.raises(DataError, match="one class only"):
        label_names(["a", "a"])


def test_long_texts_lose_the_end_of_the_longer_one(bert):
    record = Labelled(texts=["a b c a b", "a b"], label="x")
    options = DataOptions(on_long=OnLong.CUT)
    with pytest.warns(UserWarning, match="longer than 8"):
        (row,) = LabelledDataset([record], bert, 8, options, names=["x", "y"])
    assert row.first_ids == bert("a b c")["input_ids"]
    assert row.second_ids == bert("a b")["input_ids"][1:]
    with pytest.raises(DataError, match=r"10 tokens, above the limit of 8"):
        LabelledDataset([record], bert, 8, names=["x", "y"])


@pytest.mark.parametrize("which", ["bert", "ours"])
def test_tags_stand_at_the_first_token_of_each_word(which, request):
    tok = request.getfixturevalue(which)
    words = ["the", "playings", "fox", "new", "york", ","]
    ids, firsts = encode_words(tok, words)
    pieces = tok.convert_ids_to_tokens(ids)
    if which == "bert":
        assert pieces == ["the", "play", "##ing", "##s", "fox", "new", "york", ","]
        assert firsts == [0, 1, 4, 5, 6, 7]
    for word, place, following in zip(words, firsts, [*firsts[1:], len(ids)], strict=True):
        assert tok.decode(ids[place:following]).strip() == word
    record = Tagged(tokens=words, tags=["O", "O", "O", "B-LOC", "I-LOC", "O"])
    (row,) = TaggedDataset([record], tok, 64, names=["O", "B-LOC", "I-LOC"])
    assert row.input_ids == [tok.cls_token_id, *ids, tok.sep_token_id]
    assert row.places == [f + 1 for f in firsts] and row.tags == [0, 0, 0, 1, 2, 0]


def test_judges_and_choosers_read_texts(bert):
    asked = [{"role": "user", "content": "a b"}]
    (pair,) = JudgedDataset([Pair(prompt=asked, chosen="c", rejected="fox")], bert, 9)
    assert pair.prompt_ids + pair.chosen_ids == bert("a b", "c")["input_ids"]
    assert pair.prompt_ids + pair.rejected_ids == bert("a b", "fox")["input_ids"]
    (choice,) = ChoiceDataset([Labelled(texts=["a b"], label="y")], bert, 9, names=["x", "y"])
    assert choice.prompt_ids == bert("a b")["input_ids"] and choice.prompt.answer == "y"
