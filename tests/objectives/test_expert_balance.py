"""A model with experts: its own losses reach the step, whatever the split, and spread the tokens."""

import pytest
import torch

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.data.packing import PackedRow
from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.objectives.clm import CLM, PretrainOptions
from distllm.objectives.experts import WithExperts, with_experts
from distllm.optim.options import AdamWOptions
from distllm.train.step import optimizer_step

SHAPE = {
    "vocab_size": 31, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 16,
    "max_seq_len": 32, "init_std": 0.2, "num_experts": 4, "experts_per_token": 1,
}  # fmt: skip


def rows(count):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 31, (count, 13), generator=generator)
    segments = torch.tensor([1] * 5 + [2] * 7)
    return [PackedRow(row[:-1], row[1:], segments, i) for i, row in enumerate(ids)]


def train(steps, micro_batch, **changes):
    options = DecoderOptions(**(SHAPE | {"balance_coef": 0.5, "router_z_coef": 0.1} | changes))
    engine = build_engine(
        "model", Decoder(options), options=EngineOptions(),
        hardware=HardwareOptions(device="cpu", threads=1), precision="fp32",
        optim=AdamWOptions(lr=0.01),
    )  # fmt: skip
    objective = with_experts(CLM(PretrainOptions(), pad_id=0), options)
    examples, results = rows(8), []
    for _ in range(steps):
        parts = [objective.collate(examples[i : i + micro_batch]) for i in range(0, 8, micro_batch)]
        results.append(optimizer_step(engine, objective, parts, 0.01))
    return results


def test_terms_are_reported_and_count():
    (first,) = train(1, 8)
    terms = {k: v for k, v in first.metrics.items() if k.startswith("loss_")}
    assert set(terms) == {"loss_lm", "loss_balance", "loss_router_z"}
    assert first.loss == pytest.approx(sum(terms.values()))
    assert terms["loss_balance"] >= 0.5 * 0.99  # coefficient x k, when even


def test_the_split_into_micro_batches_changes_nothing():
    whole, halves = train(3, 8), train(3, 2)
    for a, b in zip(whole, halves, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_balance_is_learned():
    results = train(30, 8, balance_coef=2.0, router_z_coef=0.0)
    assert "loss_router_z" not in results[0].metrics
    assert results[-1].metrics["loss_balance"] < results[0].metrics["loss_balance"] - 0.02


def test_models_without_balanced_experts_are_left_alone():
    inner = CLM(PretrainOptions(), pad_id=0)
    assert with_experts(inner, DecoderOptions()) is inner
    off = DecoderOptions(**SHAPE, balance_coef=0.0)
    assert with_experts(inner, off) is inner
    assert isinstance(with_experts(inner, DecoderOptions(**SHAPE)), WithExperts)
