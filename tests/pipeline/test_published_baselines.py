"""The n-gram rows beside real corpora, read the way the recipes read them."""

import math

import pytest
from shared_data import ROOT, shared

from distllm.config.compose import compose
from distllm.data import ngram
from distllm.data.datasets import text_rows
from distllm.data.source import open_source
from distllm.data.tokenizer import train_tokenizer


def costs(monkeypatch, *overrides):
    """Return nats per held-out token of each n-gram model, and the numbers of tokens of both sides."""
    monkeypatch.setenv("DISTLLM_SHARED_DATA", str(ROOT))
    config = compose(list(overrides))
    source = open_source(config.data, config.run.seed)
    tokenizer = train_tokenizer(source.texts(), config.arch.vocab_size, units=config.data.units)
    rows = [text_rows(source, tokenizer, config.train.seq_len, s) for s in ("train", "heldout")]
    documents = [[d[:-1] for d in r.documents()] for r in rows]
    found = ngram.baselines(
        *documents, len(tokenizer), tokenizer.eos_token_id, config.stage.ngram_order
    )
    return found, [r.num_tokens for r in rows], len(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "tokens", "perplexity"), [("valid", 217_646, 232.5), ("test", 245_569, 217.8)]
)
def test_words_of_wikitext2(monkeypatch, split, tokens, perplexity):
    path = shared("wikitext2", f"{split}.txt")
    found, counts, size = costs(
        monkeypatch, "experiment=wikitext2_lstm", f"data.heldout_path='{path}'"
    )
    assert counts == [2_088_628, tokens]  # the official ones; the end token is the last line's end
    assert size == 33_278 - 1 + 1 + 6  # words and line end, with <unk> among them, beside ours
    assert math.exp(found["kneser_ney_5"]) == pytest.approx(perplexity, abs=0.15)


@pytest.mark.slow
def test_characters_of_shakespeare(monkeypatch):
    shared("tinyshakespeare", "input.txt")
    found, counts, size = costs(monkeypatch, "experiment=shakespeare_char")
    assert sum(counts) == pytest.approx(1_115_394, abs=4)
    assert size == 65 + 7
    assert found["kneser_ney_7"] == pytest.approx(1.5165, abs=5e-4)
    assert found["kneser_ney_7"] < found["kneser_ney_5"] < found["kneser_ney_3"]
