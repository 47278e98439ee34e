"""A wrapped model of transformers keeps the names and the number of the labels it was trained to tell apart."""

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM

from distllm.arch.io import load_model, save_model
from distllm.config.abilities import abilities_of
from distllm.config.compose import compose


@pytest.fixture
def albert(tmp_path):
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=50, embedding_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    AlbertForMaskedLM(config).save_pretrained(tmp_path / "albert")
    return tmp_path / "albert"


@pytest.mark.filterwarnings("ignore:arch=auto")
@pytest.mark.parametrize("head", ["classify", "tag"])
def test_labels_survive(albert, tmp_path, head):
    names = ["bad", "good", "neither"]
    model, _ = load_model(albert, head=head, arch="auto", changes={"num_labels": 3})
    assert model.label_names == []  # transformers' placeholders are not names
    model.label_names = names
    save_model(model, None, tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    assert again.label_names == names and again.options.num_labels == 3
    ids = torch.arange(4, 12)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_what_it_can_learn_follows_its_kind(albert):
    able = abilities_of(compose(["arch=auto", f"model='{albert}'", "stage=classify"]))
    assert able.objectives == ("mlm",) and not able.generates
