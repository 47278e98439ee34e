"""Heads that give verdicts against transformers' classes, read from their files and written back."""

import pytest
import torch
from safetensors.torch import load_file

from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

HEADS = ["classify", "last", "tag"]
CASES = [
    (name, head)
    for name in ("bert", "roberta", "modernbert", "llama", "gpt2", "qwen3")
    for head in HEADS
]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_verdicts(tmp_path, name, head):
    family = families()[name]
    labels = {"last": 1}.get(head, 3)
    reference = parity.reference(family, head, num_labels=labels, pad_token_id=1)
    folder = parity.save(reference, tmp_path / "theirs")
    ours, _ = load_model(folder, head="last" if head == "last" else None)
    assert ours.head_name == head
    ids, mask = parity.padded(family.tiny["vocab_size"], "right")
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).logits
        out = ours(ids, mask)
    if head == "last":
        got, expected = out.scores, expected[:, 0]
    elif head == "tag":
        got, expected = out.logits[mask.bool()], expected[mask.bool()]
    else:
        got = out.logits
    assert parity.relative_error(got, expected) <= 1e-5
    assert expected.std() > 0.02
    save_model(ours, None, tmp_path / "ours")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    again = getattr(transformers, family.architectures[head]).from_pretrained(tmp_path / "ours")
    assert again.config.num_labels == labels


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_mean_and_first_pooling(tmp_path, name):
    """ModernBERT can average; what is padding does not count."""
    family = families()["modernbert"]
    pooling = {"bert": "cls", "modernbert": "mean"}[name]
    reference = parity.reference(family, "classify", num_labels=3, classifier_pooling=pooling)
    ours, _ = load_model(parity.save(reference, tmp_path / "m"))
    ids, mask = parity.padded(97, "right")
    with torch.no_grad():
        expected, got = reference(input_ids=ids, attention_mask=mask).logits, ours(ids, mask).logits
    assert parity.relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "llama"])
def test_a_body_alone(tmp_path, name):
    family = families()[name]
    reference = parity.reference(family, "none")
    folder = parity.save(reference, tmp_path / "theirs")
    ours, _ = load_model(folder)
    assert ours.head_name == "none"
    ids, mask = parity.padded(97, "right")
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        out = ours(ids, mask)
    assert out.logits is None
    real = mask.bool()
    assert parity.relative_error(out.last_hidden_state[real], expected[real]) <= 1e-5
    save_model(ours, None, tmp_path / "ours")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_pooler_on_disk_is_used_by_a_new_classifier(tmp_path):
    """BERT's pooled layer is trained; only the last matrix has to be drawn."""
    family = families()["bert"]
    folder = parity.save(parity.reference(family, "none"), tmp_path / "m")
    body, _ = load_model(folder)
    classifier, _ = load_model(folder, head="classify")
    assert torch.equal(classifier.head.pooler.weight, body.head.pooler.weight)
    assert (classifier.head.bias == 0).all() and classifier.head.weight.std() > 0


def test_token_types_are_felt(tmp_path):
    family = families()["bert"]
    reference = parity.reference(family)
    ours, _ = load_model(parity.save(reference, tmp_path / "m"))
    ids, _ = parity.padded(97, "none")
    types = (torch.arange(parity.SEQ) >= 11).long().expand_as(ids)
    with torch.no_grad():
        expected = reference(input_ids=ids, token_type_ids=types).logits
        got, without = ours(ids, token_type_ids=types).logits, ours(ids).logits
    assert parity.relative_error(got, expected) <= 1e-5
    assert parity.relative_error(without, expected) > 1e-2
