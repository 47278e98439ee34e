"""Checklist, item 43: a policy that is trained through an adapter."""

import json

import pytest
import torch
from checklist import holds_and_notices

from distllm.arch import adapter
from distllm.arch.adapter import AdapterOptions, attach, merged
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.io import load_model, save_model
from distllm.engines import native
from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.optim.options import AdamWOptions
from distllm.pipeline import build, reference
from distllm.pipeline.reference import WithoutAdapter
from distllm.rl.scoring import score_logprobs
from distllm.testing.rl import make_rollout
from distllm.testing.stages import SKILLS, run_tiny, tiny_model

pytest.importorskip("peft")

SHAPE = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32, "max_seq_len": 24}  # fmt: skip
CPU = {"hardware": HardwareOptions(device="cpu", threads=1), "precision": "fp32"}
"""Where engines of this file run."""


def base_model():
    return Decoder(DecoderOptions(**SHAPE), seed=3)


def policy():
    """Build an engine whose adapter has learned something."""
    model = base_model()
    attach(model, AdapterOptions(name="lora", rank=2, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return build_engine("policy", model, options=EngineOptions(), optim=AdamWOptions(), **CPU)


def logprobs(engine, rollouts):
    join = engine.model.join if hasattr(engine, "model") else base_model().join
    return torch.cat(score_logprobs(engine, rollouts, join, 0, 1.0, batch_size=2))


def test_item_43_the_reference_is_the_model_with_the_adapter_off():
    rollouts = [make_rollout([1, 2, 3], [4, 5, 6]), make_rollout([7], [8, 9])]
    alone = build_engine("reference", base_model(), options=EngineOptions(), **CPU)
    expected = logprobs(alone, rollouts)

    def check():
        engine = policy()
        now, ref = logprobs(engine, rollouts), logprobs(WithoutAdapter(engine), rollouts)
        assert torch.equal(ref, expected)
        assert (now - ref).abs().min() > 1e-3
        assert torch.equal(logprobs(engine, rollouts), now), "it is on again"

    off = "            layer._disable_adapters = True\n"
    holds_and_notices(
        check,
        (adapter, off, off.replace("True", "False")),
        (adapter, "            layer._disable_adapters = False\n", "            pass\n"),
        (reference, "with switched_off(model):", "if model:"),
    )


def test_item_43_an_adapter_has_its_own_learning_rate(tmp_path):
    model, count = tiny_model(tmp_path), iter(range(9))

    def rates(*settings):
        folder = tmp_path / f"run{next(count)}"
        asked = ["stage=sft", *SKILLS, f"model='{model}'", "train.max_steps=1", "optim.lr=1e-3"]
        run_tiny(folder, [*asked, "train.log_every_steps=1", "train.num_eval_samples=1", *settings])
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [m["train/lr"] for m in lines if "train/lr" in m]

    def check():
        assert rates("adapter=lora", "adapter.lr=0.02") == [0.02]
        assert rates("adapter=lora") == [1e-3]

    own = '(adapter.name != "none" and adapter.lr) or '
    holds_and_notices(check, (build, own, ""))
    assert rates() == [1e-3]


def test_item_43_what_samples_and_what_is_exported_has_the_adapter_in_it(tmp_path):
    """The sampler's log-probabilities are those of the trained model, and the merged directory computes the same."""
    prompts = [[1, 2, 3], [4, 5]]
    options = GenerationOptions(max_new_tokens=4)

    def sampled(engine):
        with engine.sampling() as model:
            return generate(model, prompts, options, end_ids=[0], pad_id=0, seed=5)

    def check():
        engine = policy()
        rollouts = sampled(engine)
        said = torch.cat([r.rollout_logprobs for r in rollouts])
        now = logprobs(engine, rollouts)
        torch.testing.assert_close(said.to(now.dtype), now, rtol=0, atol=1e-5)
        folder = tmp_path / "model"
        save_model(engine.model, None, folder, state=merged(engine.model, engine.export()))
        alone = build_engine("merged", load_model(folder)[0], options=EngineOptions(), **CPU)
        torch.testing.assert_close(logprobs(alone, rollouts), now, rtol=0, atol=1e-5)
        assert (logprobs(WithoutAdapter(engine), rollouts) - now).abs().max() > 0.1

    stale = ("            yield self.model\n", "            from distllm.arch.adapter import switched_off\n            with switched_off(self.model):\n                yield self.model\n")  # fmt: skip
    holds_and_notices(
        check,
        (native, *stale),
        (adapter, "(up @ down) * layer", "0.0 * (up @ down) * layer"),
    )
