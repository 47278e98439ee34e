"""Tokenizers of words and of characters, and the end of a text as held-out data."""

import pytest

from distllm.data.options import DataOptions, HeldoutBy, Units
from distllm.data.source import open_source
from distllm.data.tokenizer import encode_texts, load_tokenizer, save_tokenizer, train_tokenizer
from distllm.errors import ConfigError, DataError

TEXT = " = Cats = \n \n a cat , a <unk> \n a dog \n"


def test_words_are_what_stands_between_spaces_and_a_line_end_is_one(tmp_path):
    save_tokenizer(train_tokenizer([TEXT], 100, units=Units.WORD), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = encode_texts(tokenizer, [TEXT])
    expected = [w for line in TEXT.splitlines() for w in [*line.split(), "\n"]]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) == len(expected) and pieces[:8] == expected[:8]
    assert ids.count(tokenizer.unk_token_id) == expected.count("<unk>")  # as WikiText spells it
    with pytest.raises(DataError, match=r"<\|eos\|>"):  # never the real one by accident
        encode_texts(tokenizer, ["a <|eos|> cat"])
    assert tokenizer.decode(encode_texts(tokenizer, ["a cat , a dog"])[0]) == "a cat , a dog"


def test_rare_words_are_unknown():
    tokenizer = train_tokenizer(["a a a b b c"], 9, units=Units.WORD)
    pieces = tokenizer.convert_ids_to_tokens(encode_texts(tokenizer, ["c b a"])[0])
    assert pieces == ["<unk>", "b", "a"]


def test_characters_come_back_exactly():
    text = "Who's there?\n\n  Nay, \u00e9\t"
    tokenizer = train_tokenizer([text], 64, units=Units.CHARACTER)
    (ids,) = encode_texts(tokenizer, [text])
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert encode_texts(tokenizer, ["Z"]) == [[tokenizer.unk_token_id]]


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size=7 leaves no room for words beside 7.*Set 8"):
        train_tokenizer(["a b"], 7, units=Units.WORD)


@pytest.mark.parametrize("separator", ["", "\\n"])
def test_the_end_is_held_out(tmp_path, separator):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)), encoding="utf-8")
    options = DataOptions(
        name="file",
        path=str(path),
        document_separator=separator,
        heldout_by=HeldoutBy.END,
        heldout_fraction=0.1,
    )
    source = open_source(options, 0)
    train, held = (source.documents(split) for split in ("train", "heldout"))
    if separator:
        assert [d.text for d in held] == [f"line {i}" for i in range(90, 100)]
        assert len(train) == 90
    else:
        whole = path.read_text(encoding="utf-8").strip()
        assert [d.text for d in (*train, *held)] == [
            whole[: int(len(whole) * 0.9)],
            whole[int(len(whole) * 0.9) :],
        ]
