"""Derived numbers against other ways of getting them: closed formulas, torch's own counter, real runs."""

import os
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distllm import registry
from distllm.arch.adapter import attach
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.config.compose import compose
from distllm.config.footprint import (
    build_meta,
    cache_bytes,
    parameters_by_part,
    saved_bytes,
)
from distllm.config.plan import available_bytes, count_epochs, make_plan
from distllm.config.roles import roles_of
from distllm.data.tokenizer import train_tokenizer
from distllm.errors import ConfigError
from distllm.layers import products
from distllm.types import IGNORE_INDEX

SHAPES = [
    DecoderOptions(),
    DecoderOptions(tie_embeddings=False, n_layers=3),
    DecoderOptions(
        vocab_size=77, d_model=20, n_layers=2, n_heads=5, n_kv_heads=1, d_head=6, d_ff=36
    ),
]
TINY = ["arch.vocab_size=300", "arch.d_model=16", "arch.n_layers=2", "arch.d_ff=24", "run.dir=x"]


@pytest.mark.parametrize("options", SHAPES)
def test_parameters_equal_the_closed_formula(options):
    d, layers = options.d_model, options.n_layers
    d_head = options.d_head or d // options.n_heads
    expected = {
        "embed": options.vocab_size * d,
        "attention": layers * 2 * d * d_head * (options.n_heads + options.n_kv_heads),
        "feed_forward": layers * 3 * d * options.d_ff,
        "norms": (2 * layers + 1) * d,
    }
    if not options.tie_embeddings:
        expected["head"] = options.vocab_size * d
    assert parameters_by_part(build_meta(options)) == expected


def test_the_preset_has_the_size_it_claims():
    plan = make_plan(compose(["arch=llama_tiny"]))
    assert plan.parameters["total"] == 4_000_000
    assert sum(p.numel() for p in Decoder(compose([]).arch).parameters()) == 4_000_000


@pytest.mark.parametrize(
    ("overrides", "head"),
    [
        (["stage=sft", "arch=llama_tiny"], "lm"),
        (["stage=reward", "stage.head=last", "arch=t5_tiny", "adapter.rank=3"], "last"),
        (["stage=sft", "arch=glm_tiny", "adapter.targets=[q_proj,down_proj]"], "lm"),
    ],
)
def test_the_plan_counts_what_an_adapter_trains(overrides, head):
    pytest.importorskip("peft")
    config = compose(["adapter=lora", "run.dir=x", *overrides])
    model = build_meta(config.arch, head)
    attach(model, config.adapter, seed=0)
    plan = make_plan(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters["trained"] == trained
    assert 0 < trained < 0.2 * plan.parameters["total"]
    assert plan.parameters["total"] == sum(p.numel() for p in model.parameters())
    if hasattr(config.arch, "n_decoder_layers"):
        return  # its memory is that of as many of the largest block
    assert plan.memory["gradients"] == 4 * trained
    assert plan.memory["optimizer"] == 8 * trained
    assert plan.memory["weights, model"] == 4 * plan.parameters["total"]


def test_a_model_without_linear_layers_takes_no_adapter():
    with pytest.raises(
        ConfigError, match="stands beside linear layers, and the blocks of this model have none"
    ):
        make_plan(compose(["adapter=lora", "arch=lstm_tiny", "stage=sft", "run.dir=x"]))


def test_with_an_adapter_no_second_copy_is_planned_for_the_reference():
    stages = {"dpo": ["stage=dpo"], "grpo": ["stage=grpo", "data=skills", "stage.kl_coef=0.1"]}
    for overrides in stages.values():
        both, one = (roles_of(compose([*overrides, *own])) for own in ([], ["adapter=lora"]))
        assert [r.name for r in both if r not in one] == ["reference"]


def test_a_frozen_weight_costs_two_thirds_of_a_trained_one():
    """Forward and the gradient of the input: 4 operations for each weight and token; an adapter's own weights cost 6."""
    whole, frozen = (
        make_plan(compose(["arch=llama_tiny", "train.seq_len=64", *own, "run.dir=x"]))
        for own in ([], ["adapter=lora"])
    )
    key, base = "per token, full attention", whole.parameters["multiplied"]
    adapter = frozen.parameters["multiplied"] - base
    assert adapter == frozen.parameters["trained"]
    assert frozen.flops[key] - whole.flops[key] == pytest.approx(6 * adapter - 2 * base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("arch", ["decoder", "encoder"])
def test_saved_bytes_are_those_the_allocator_sees(arch, dtype, packed):
    """The profiler counts what a real forward allocates and does not free; the output is not held for backward."""
    arch = registry.get("arch", arch)
    options = arch.Options(vocab_size=300, d_model=32, n_layers=4, d_ff=48)
    model, ids = arch(options), torch.zeros(2, 64, dtype=torch.int64)
    segments = torch.ones_like(ids) if packed else None
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        output = model(ids, segment_ids=segments, compute_logits=False).last_hidden_state
    held = sum(e.self_cpu_memory_usage for e in profiler.key_averages()) - output.nbytes
    assert saved_bytes(options, 2, 64, dtype, packed=packed) == pytest.approx(held, rel=0.01)


def test_state_bytes_equal_those_of_a_real_engine():
    from distllm.engines.base import build_engine
    from distllm.objectives.clm import CLM
    from distllm.types import Batch

    config = compose([*TINY, "hardware.device=cpu"])
    engine = build_engine("model", Decoder(config.arch), options=config.engine,
                          hardware=config.hardware, precision="fp32", optim=config.optim)  # fmt: skip
    ids = torch.arange(8)[None]
    labels = torch.cat([ids[:, 1:], torch.tensor([[IGNORE_INDEX]])], dim=1)
    batch = Batch(input_ids=ids, labels=labels, segment_ids=torch.ones_like(ids))
    objective = CLM(config.stage, pad_id=0)
    engine.forward_backward(objective, [batch], objective.weights(batch))
    gradients = sum(p.grad.nbytes for p in engine.model.parameters())
    engine.update(1e-3)
    state = dict(engine.state())
    memory = make_plan(config).memory
    assert memory["weights, model"] == sum(v.nbytes for k, v in state.items() if k[:7] == "weight/")
    assert memory["gradients"] == gradients
    assert memory["optimizer"] == sum(v.nbytes for k, v in state.items() if k[:8] == "exp_avg_"
                                              or k[:8] == "exp_avg/")  # fmt: skip


def test_cache_bytes_equal_a_real_cache(monkeypatch):
    # A CPU without bf16 instructions keeps the cache as it multiplies it, in fp32.
    monkeypatch.setattr(products, "HAS_FAST_BF16", True)
    model = Decoder(DecoderOptions(vocab_size=300, d_model=32, n_layers=2, d_ff=48))
    real = model.new_cache(3, 40, torch.bfloat16, "cpu").data.nbytes
    assert cache_bytes(build_meta(model.options), 3, 40, torch.bfloat16) == real


def test_recomputing_blocks_saves_memory():
    plain, recomputed = (
        make_plan(
            compose(["train.micro_batch_size=8", f"engine.activation_checkpointing={a}"])
        ).memory
        for a in ("none", "full")
    )
    name = "activations"
    assert recomputed[name] < plain[name] / 2


def test_batch_arithmetic():
    plan = make_plan(
        compose(["train.global_batch_size=96", "train.micro_batch_size=8", "train.seq_len=128"]),
        dp_size=3,
    )
    assert plan.batch["x grad_accum_steps"] == 4
    assert plan.batch["tokens per step at most"] == 96 * 128
    assert plan.batch["tokens in all at most"] == 96 * 128 * 100
    assert plan.flops["per step at most, full attention"] == (
        96 * 128 * plan.flops["per token, full attention"]
    )
    pairs = make_plan(compose(["stage=reward", "train.seq_len=64"]))
    assert pairs.batch["tokens per step at most"] == 32 * 2 * 64


def test_rollout_arithmetic_and_roles():
    config = compose(["stage=ppo", "stage.num_samples=4", "stage.num_epochs=3",
                      "stage.rollout_batch_size=128", "stage.kl_coef=0.1", *TINY])  # fmt: skip
    plan = make_plan(config)
    assert plan.batch["= prompts"] == 32
    assert plan.batch["updates per rollout batch"] == 12
    assert [r.name for r in roles_of(config)] == ["policy", "value", "reference"]
    weights = plan.memory["weights, policy"]
    assert plan.memory["gradients"] == weights + plan.memory["weights, value"]
    assert plan.memory["key/value cache"] > 0
    assert [r.name for r in roles_of(compose(["stage=grpo", *TINY]))] == ["policy"]
    assert [r.head for r in roles_of(compose(["stage=reward", "stage.head=last", *TINY]))] == [
        "last"
    ]


def test_epochs_of_dialogues_and_documents(tmp_path):
    config = compose(["stage=sft", "data=skills", "data.num_train=400", "train.max_steps=50"])
    counted = count_epochs(config)
    assert counted["dialogues to learn from"] == 400
    assert counted["epochs"] == 50 * 32 / 400
    (tmp_path / "a.txt").write_text("word " * 4000)
    (tmp_path / "b.txt").write_text("other " * 10)
    config = compose(["data=file", f"data.path={tmp_path / 'a.txt'}", "train.seq_len=100",
                      f"data.heldout_path={tmp_path / 'b.txt'}", "train.global_batch_size=32"])  # fmt: skip
    assert count_epochs(config)["epochs"] == "unknown"
    tokenizer = train_tokenizer(["word " * 10], 300)
    ids = len(tokenizer("word " * 4000).input_ids) + 1  # the end-of-document token
    rows = count_epochs(config, tokenizer)["rows to learn from"]
    assert rows == pytest.approx(ids / 100, abs=1)


def test_available_memory_is_that_of_the_kernel():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(lines["MemTotal"].split()[0]) * 1024
    found = available_bytes()
    assert found is not None and 0 < found <= total
    if not os.path.exists("/sys/fs/cgroup/memory.max"):
        assert found == pytest.approx(total, rel=0.01)
