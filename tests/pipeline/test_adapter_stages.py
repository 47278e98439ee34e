"""Whole stages through an adapter: what changes in the exported model, what a checkpoint holds, exact resume, one copy."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from patched import planted
from safetensors.torch import load_file, save_file
from test_resume import same_checkpoint

from distllm.arch import adapter
from distllm.config.compose import compose
from distllm.engines import native
from distllm.errors import CheckpointError
from distllm.pipeline import build as build_module
from distllm.pipeline import preferences, reference, reinforcement
from distllm.pipeline.build import Builder
from distllm.testing.stages import SKILLS, TINY, StopAfter, run_tiny, weights_hash, write_text

pytest.importorskip("peft")

RANK = 2
LORA = [
    *SKILLS,
    "adapter=lora",
    f"adapter.rank={RANK}",
    "train.max_steps=4",
    "train.save_every_steps=1",
    "train.micro_batch_size=4",
    "optim.lr=1e-2",
    "train.num_eval_samples=2",
]
REWARD = ["stage.reward=regex", "stage.reward_pattern='[a-m]'", "stage.reward_workers=1", "stage.reward_timeout_s=120"]  # fmt: skip
STAGES = {
    "sft": ["stage=sft", "adapter.dropout=0.1"],
    "reward": ["stage=reward", "stage.head=last"],
    "dpo": ["stage=dpo", "stage.reference=live"],
    "kto": ["stage=kto"],
    "simpo": ["stage=simpo"],
    "grpo": ["stage=grpo", "stage.num_samples=4", "stage.kl_coef=0.1", *REWARD],
    "ppo": ["stage=ppo", "stage.kl_coef=0.1", *REWARD],
}
NEW_HEAD = {"reward": {"score.weight"}}
T5 = ["arch=t5_tiny", "arch.d_head=4", "arch.n_kv_heads=4"]


@pytest.fixture(scope="module")
def t5_parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    text = write_text(folder / "text.txt")
    settings = ["stage=pretrain", "data=file", f"data.path='{text}'", "train.max_steps=1"]
    run_tiny(folder / "run", [*T5, *settings])
    return folder / "run" / "model"


def only_low_rank_changes(base, run, new=frozenset()):
    """Everything but targets and a new head is what it was, bit for bit; a target differs by a matrix of low rank."""
    before, after = (load_file(p / "model.safetensors") for p in (base, run / "model"))
    assert set(after) - set(before) == set(new)
    changed = 0
    for name in set(before) & set(after):
        if torch.equal(before[name], after[name]):
            continue
        changed += 1
        assert name.endswith(("proj.weight", ".q.weight", ".k.weight", ".v.weight", ".o.weight", "wi_0.weight", "wi_1.weight", "wo.weight")), name  # fmt: skip
        sizes = torch.linalg.svdvals((after[name] - before[name]).double())
        assert sizes[RANK] < 1e-4 * sizes[0], name
    assert changed > 4


def holds_the_adapter_alone(run, role, new=frozenset()):
    """A checkpoint has the trained parameters and their moments, and nothing of the base model."""
    path = run / "checkpoints" / "step_00000004" / f"{role}.safetensors"
    saved = load_file(path)
    kinds = {}
    for key in saved:
        kind, name = key.split("/", 1)
        if kind == "buffer":  # the mean and the spread of a reward model's scores
            continue
        kinds.setdefault(kind, set()).add(name)
        assert adapter.is_adapter(name) or name in new, key
    assert set(kinds) == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert len({frozenset(names) for names in kinds.values()}) == 1


SLOW = ("kto", "simpo", "ppo", "reward")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in STAGES]
)
def test_a_stage_trains_the_adapter_and_goes_on_bit_for_bit(name, parent, tmp_path):
    settings = [*LORA, *STAGES[name], f"model='{parent}'"]
    assert run_tiny(tmp_path / "whole", settings).finished
    role = "policy" if name in ("grpo", "ppo") else "model"
    only_low_rank_changes(parent, tmp_path / "whole", NEW_HEAD.get(name, frozenset()))
    holds_the_adapter_alone(
        tmp_path / "whole", role, {"head.weight"} if name in NEW_HEAD else frozenset()
    )
    assert not run_tiny(tmp_path / "parts", settings, StopAfter(3)).finished
    assert run_tiny(tmp_path / "parts", settings).finished
    same_checkpoint(tmp_path / "whole", tmp_path / "parts", step=4)
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "parts")
    if name == "ppo":
        holds_the_adapter_alone(tmp_path / "whole", "value", {"head.weight", "head.bias"})


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sft", "grpo"))]
)
def test_an_encoder_decoder_is_trained_so_too(name, t5_parent, tmp_path):
    run_tiny(tmp_path / "run", [*T5, *LORA, *STAGES[name], f"model='{t5_parent}'"])
    only_low_rank_changes(t5_parent, tmp_path / "run")
    holds_the_adapter_alone(tmp_path / "run", "policy" if name == "grpo" else "model")
    from transformers import AutoModelForSeq2SeqLM

    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_a_wrapped_model_of_transformers_is_trained_so_too(parent, tmp_path):
    with pytest.warns(UserWarning, match="arch=auto"):
        run_tiny(tmp_path / "run", [*LORA, "stage=sft", "arch=auto", f"model='{parent}'"])
    only_low_rank_changes(parent, tmp_path / "run")
    holds_the_adapter_alone(tmp_path / "run", "model")


def test_other_weights_under_a_half_trained_adapter_are_refused(parent, tmp_path):
    shutil.copytree(parent, tmp_path / "base")
    settings = [*LORA, *STAGES["sft"], f"model='{tmp_path / 'base'}'"]
    assert not run_tiny(tmp_path / "run", settings, StopAfter(2)).finished
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        run_tiny(tmp_path / "run", settings)
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(parent, tmp_path / "base")
    assert run_tiny(tmp_path / "run", settings).finished


def test_beside_weights_in_4_bits_a_stage_goes_on_bit_for_bit_too(parent, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    own = ["adapter.base_bits=4", "train.precision=bf16", "arch.dropout=0"]
    settings = [*LORA, *STAGES["dpo"], *own, f"model='{parent}'"]
    assert run_tiny(tmp_path / "whole", settings).finished
    holds_the_adapter_alone(tmp_path / "whole", "model")
    assert not run_tiny(tmp_path / "parts", settings, StopAfter(3)).finished
    assert run_tiny(tmp_path / "parts", settings).finished
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "parts")
    base, run = (json.loads((p / "result.json").read_text()) for p in (parent.parent, tmp_path / "whole"))  # fmt: skip
    beside = sum(t.numel() for k, t in load_file(tmp_path / "whole" / "checkpoints" / "step_00000004" / "model.safetensors").items() if k.startswith("weight/"))  # fmt: skip
    assert run["num_parameters"] == base["num_parameters"] + beside


def test_a_checkpoint_with_frozen_weights_would_be_noticed(parent, tmp_path):
    with planted(native, "or parameter.requires_grad:", "or True:"):
        run_tiny(tmp_path / "run", [*LORA, *STAGES["sft"], f"model='{parent}'"])
    with pytest.raises(AssertionError):
        holds_the_adapter_alone(tmp_path / "run", "model")


def test_a_forgotten_merge_would_be_noticed(parent, tmp_path):
    with planted(adapter, " + (up @ down) * layer.scaling[_NAME]", ""):
        run_tiny(tmp_path / "run", [*LORA, *STAGES["sft"], f"model='{parent}'"])
    with pytest.raises(AssertionError):
        only_low_rank_changes(parent, tmp_path / "run")


def copies_of_the_embedding(settings, folder):
    """Build a stage and count the storages that hold an embedding, over all its engines and whatever else is alive."""
    before = {t.untyped_storage().data_ptr() for t in embeddings()}
    builder = Builder(compose([*TINY, *settings, f"run.dir='{folder}'"]), folder)
    module = reinforcement if builder.config.stage.name == "grpo" else preferences
    parts = module.build(builder)
    found = {t.untyped_storage().data_ptr() for t in embeddings()} - before
    assert "reference" in parts.engines
    parts.close()
    return len(found)


def embeddings():
    gc.collect()
    shape = torch.Size([512, 16])
    return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == shape]


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_reference_has_no_weights_of_its_own(name, parent, tmp_path):
    settings = [*LORA, *STAGES[name], f"model='{parent}'"]
    (tmp_path / "one").mkdir()
    assert copies_of_the_embedding(settings, tmp_path / "one") == 1
    (tmp_path / "two").mkdir()
    with planted(reference, "if adapted(trained.model):", "if False:"):
        assert copies_of_the_embedding(settings, tmp_path / "two") == 2


def test_a_live_reference_says_what_one_asked_beforehand_says(parent, tmp_path):
    """The first is asked with the adapter off while it is trained, the second before it has learned anything."""
    losses = {}
    for kind in ("live", "precompute"):
        settings = [*LORA, "stage=dpo", f"stage.reference={kind}", "train.log_every_steps=1"]
        run_tiny(tmp_path / kind, [*settings, f"model='{parent}'"])
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [m["train/loss"] for m in map(json.loads, lines) if "train/loss" in m]
    assert losses["live"] == pytest.approx(losses["precompute"], rel=1e-5)
    assert losses["live"][0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert losses["live"][-1] < 0.69


def test_the_optimizer_holds_the_adapter_alone(parent, tmp_path):
    config = compose([*TINY, *LORA, "stage=sft", f"model='{parent}'", f"run.dir='{tmp_path}'"])
    builder = Builder(config, Path(tmp_path))
    engine = builder.engine("model", builder.model("lm"), trained=True)
    held = {id(p) for g in engine.optimizer.param_groups for p in g["params"]}
    named = dict(engine.model.named_parameters())
    assert held == {id(p) for n, p in named.items() if adapter.is_adapter(n)}
    assert not any(p.requires_grad for n, p in named.items() if not adapter.is_adapter(n))
    with planted(build_module, "if trained and self.config.adapter", "if False and self.config.adapter"):  # fmt: skip
        whole = builder.engine("model", builder.model("lm"), trained=True)
    assert len(list(whole.model.parameters())) == sum(len(g["params"]) for g in whole.optimizer.param_groups)  # fmt: skip
