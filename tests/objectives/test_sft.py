"""SFT: noise on the embeddings by its formula, and which tokens of a prompt and completion are learned."""

import json
import math

import pytest
import torch

from distllm.config.compose import compose
from distllm.data.datasets import ChatDataset
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import train_tokenizer
from distllm.objectives.sft import SFT, SFTOptions, noisy_inputs
from distllm.registry import get
from distllm.testing.stages import SKILLS, TINY, run_tiny
from distllm.types import IGNORE_INDEX, Batch


@pytest.fixture
def model():
    config = compose(TINY)
    return get("arch", config.arch.name)(config.arch)


def batch():
    ids = torch.arange(12).view(2, 6) + 20
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    labels = torch.where(mask, ids + 1, IGNORE_INDEX)
    return Batch(input_ids=ids, labels=labels, attention_mask=mask)


def test_noise_is_uniform_within_its_bound_and_spares_padding(model):
    alpha, d = 7.0, model.options.d_model
    torch.manual_seed(0)
    draws = torch.stack(
        [
            noisy_inputs(model, batch(), alpha)["inputs_embeds"] - model.embed(batch().input_ids)
            for _ in range(400)
        ]
    ).detach()
    for row, length in ((0, 6), (1, 3)):
        bound = alpha / math.sqrt(length * d)
        noise = draws[:, row, :length]
        assert noise.abs().max() <= bound * 1.0001
        assert noise.abs().max() > 0.98 * bound
        assert abs(noise.mean()) < 0.01 * bound
        # The variance of U(-b, b) is b^2 / 3.
        assert noise.var() == pytest.approx(bound**2 / 3, rel=0.02)
    assert draws[:, 1, 3:].abs().max() == 0


def test_noise_is_in_training_only(model):
    clean, noisy = SFT(SFTOptions(), 0), SFT(SFTOptions(neftune_alpha=5.0), 0)
    wanted = clean.loss(model.train(), batch()).losses["lm"]
    assert not torch.equal(noisy.loss(model.train(), batch()).losses["lm"], wanted)
    assert torch.equal(noisy.loss(model.eval(), batch()).losses["lm"], wanted)


@pytest.mark.slow
def test_a_noisy_run_resumes_exactly(tmp_path):
    sft = ["stage=sft", "stage.neftune_alpha=5", *SKILLS]
    run_tiny(tmp_path / "whole", [*sft, "train.max_steps=4"])
    run_tiny(tmp_path / "parts", [*sft, "train.max_steps=2"])
    run_tiny(tmp_path / "parts", [*sft, "train.max_steps=4"])
    saved = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert saved[0] == saved[1]
    run_tiny(tmp_path / "clean", ["stage=sft", *SKILLS, "train.max_steps=4"])
    assert (tmp_path / "clean/model/model.safetensors").read_bytes() != saved[0]


def test_of_prompt_and_completion_the_completion_alone_is_learned(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {n}?", "completion": f"it is {n}."} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tok = train_tokenizer([r["prompt"] + r["completion"] for r in rows], 300)
    options = DataOptions(name="file", path=str(file), heldout_fraction=0.0)
    dialogues = open_source(options, 0).dialogues("train")
    data = ChatDataset(dialogues, tok, 64)
    learned = SFT(SFTOptions(), tok.pad_token_id).collate([data[i] for i in range(9)])
    for row, wanted in zip(learned.labels, rows, strict=True):
        text = tok.decode(row[row != IGNORE_INDEX])
        assert text == wanted["completion"] + "<|end|>"
