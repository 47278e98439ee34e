"""Weights that somebody trained: a BERT encoder from the package index and a small Llama, against transformers.

Encoder-decoders and GLM are held to random weights alone: no trained ones were to be had offline.
"""

import pytest
import torch
import torch.nn.functional as F
from shared_data import minilm, shared

from distllm import generate
from distllm.arch.io import load_model
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

ONCE_UPON_A_TIME = [1, 403, 407, 261, 378]
"""Begin of text, and four tokens with which most of the training stories begin."""


def reference(cls, folder):
    return (
        getattr(transformers, cls)
        .from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )


def test_hidden_states_of_minilm():
    folder = minilm()
    ours, tokenizer = load_model(folder)
    theirs = reference("BertModel", folder)
    texts = ["A man plays the guitar.", "He plays an instrument, with some skill and much patience.",
             "Stocks fell sharply on Monday."]  # fmt: skip
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        got = ours(ids, mask).last_hidden_state
    real = mask.bool()
    assert parity.relative_error(got[real], expected[real]) <= 1e-5
    # What it was trained for: a sentence is nearer to one of like meaning.
    means = (got * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    near, far = (float(F.cosine_similarity(means[0], means[i], dim=0)) for i in (1, 2))
    assert near > 0.4 > 0.15 > far


def test_a_trained_llama_knows_its_stories():
    folder = shared("stories260k")
    ours, _ = load_model(folder)
    theirs = reference("LlamaForCausalLM", folder)
    ids = torch.tensor([ONCE_UPON_A_TIME])
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits
    assert parity.relative_error(got, expected) <= 1e-5
    losses = F.cross_entropy(got[0, :-1], ids[0, 1:], reduction="none")
    # An untrained model has 6.24.
    assert losses.mean() == pytest.approx(0.0685, abs=5e-4)


def test_greedy_tokens_of_a_trained_llama():
    """Eight prompts of different lengths, padded on the left, 64 tokens each."""
    folder = shared("stories260k")
    ours, _ = load_model(folder)
    theirs = reference("LlamaForCausalLM", folder)
    with torch.no_grad():
        story = theirs.generate(
            torch.tensor([ONCE_UPON_A_TIME]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )[0]
    starts = [1, 2, 3, 5, 8, 13, 21, 34]
    width = max(starts)
    ids, mask = (torch.zeros(8, width, dtype=torch.long) for _ in range(2))
    for row, length in enumerate(starts):
        ids[row, width - length :] = story[:length]
        mask[row, width - length :] = 1
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    got = generate(ours, ids, mask, max_new_tokens=64, temperature=0.0)
    assert got[:, width:].tolist() == expected[:, width:].tolist()
    # All rows are cut from one story and tell it on.
    tail = story[34:].tolist()
    assert got[-1, width : width + len(tail)].tolist() == tail
