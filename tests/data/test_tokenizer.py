"""The tokenizer: any text survives, digits stand alone, and what is saved loads back the same,
offline."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from distllm.data.tokenizer import (
    SPECIAL_TOKENS,
    check_fits,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from distllm.errors import ConfigError, DataError

ODD = [
    "",
    " leading and trailing ",
    "tabs\tand\r\nline ends\n\n",
    "naïve café — “quotes” … ½ ﬁ",
    "日本語 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b \ufeff \u0000 \x7f \U0010ffff \ufffe",
    "don't won't I'm 's 't",
    "<|end|> <|user|> <s> </s> [INST]",
]


def random_unicode(rng):
    points = [rng.randrange(0x110000) for _ in range(rng.randint(1, 30))]
    return "".join(chr(p) for p in points if not 0xD800 <= p <= 0xDFFF)


def test_any_text_survives(tok):
    rng = random.Random(0)
    for text in [*ODD, *(random_unicode(rng) for _ in range(300))]:
        [ids] = encode_texts(tok, [text])
        assert tok.decode(ids) == text
        assert not set(ids) & set(range(len(SPECIAL_TOKENS)))


def test_digits_stand_alone(texts):
    """Even where a number is the commonest word of all."""
    tok = train_tokenizer([*texts, "x 12345 " * 50], 400)
    [ids] = encode_texts(tok, ["x 12345 7 99"])
    digits = [t for t in (tok.decode([i]) for i in ids) if any(c.isdigit() for c in t)]
    assert digits == list("12345799")


def test_special_tokens(tok):
    assert tok.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (tok.pad_token_id, tok.eos_token_id) == (0, 1)
    assert set(tok.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tok.decode([3, *encode_texts(tok, ["hi"])[0], 5], skip_special_tokens=True) == "hi"


def test_saved_loads_back_the_same_beside_any_model_config(tok, tmp_path):
    """`config.json` must not talk AutoTokenizer into another class with other rules."""
    folder = tmp_path / "with spaces"
    save_tokenizer(tok, folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
    for loaded in (load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))):
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tok)
        for text in ODD:
            assert loaded(text).input_ids == tok(text).input_ids
            assert loaded.decode(loaded(text).input_ids) == text
        assert loaded.apply_chat_template(messages, tokenize=False) == (
            "<|user|>1 2<|end|><|assistant|>3<|end|>"
        )
    again = tmp_path / "again"
    save_tokenizer(load_tokenizer(folder), again)
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_same_texts_give_the_same_tokenizer_in_another_process(texts):
    code = (
        "import json, sys; from distllm.data.tokenizer import *; "
        "print(tokenizer_fingerprint(train_tokenizer(json.load(sys.stdin), 400)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == tokenizer_fingerprint(train_tokenizer(iter(texts), 400))


def test_fingerprint_sees_every_part_and_nothing_else(tok, texts):
    known = tokenizer_fingerprint(tok)
    tok("one two", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_fingerprint(tok) == known
    other = train_tokenizer(texts, 399)
    assert tokenizer_fingerprint(other) != known
    twin = train_tokenizer(texts, 400)
    assert tokenizer_fingerprint(twin) == known
    twin.chat_template += " "
    assert tokenizer_fingerprint(twin) != known
    twin = train_tokenizer(texts, 400)
    twin.eos_token = "<|end|>"
    assert tokenizer_fingerprint(twin) != known


def test_size(tok, texts):
    assert len(tok) == 400 == len(train_tokenizer(texts, 400))
    check_fits(tok, 400)
    with pytest.raises(ConfigError, match=r"has 400 tokens .*arch\.vocab_size=399.*vocab_size=400"):
        check_fits(tok, 399)
    with pytest.raises(ConfigError, match="vocab_size=100 is below 262"):
        train_tokenizer(texts, 100)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", ""], 400)


def test_folders_without_a_tokenizer(tok, tmp_path):
    with pytest.raises(ConfigError, match="gone is not a folder"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(ConfigError, match=f"tokenizer={tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path)
    save_tokenizer(tok, tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
