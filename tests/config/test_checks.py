"""Values by themselves, values against each other, the machine: each problem with its numbers, all of them together."""

import pytest

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.io import save_model
from distllm.config import checks
from distllm.config.compose import compose
from distllm.config.files import GROUPS
from distllm.config.schema import Config, leaves, options_of
from distllm.engines import hardware
from distllm.errors import ConfigError


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


def training_message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        checks.check_training(compose(overrides))
    return str(caught.value)


def all_keys() -> dict[str, object]:
    """Every dotted key of every option of every group -> its default."""
    keys = {leaf.key: leaf.value for leaf in leaves(Config())}
    for group in GROUPS:
        for options in options_of(group).values():
            keys |= {leaf.key: leaf.value for leaf in leaves(options, f"{group}.")}
    return keys


def test_every_number_has_a_rule():
    unruled = [
        key
        for key, value in all_keys().items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and key not in checks.rules()
    ]
    assert unruled == []


def test_every_rule_is_about_a_field():
    assert set(checks.rules()) <= set(all_keys())


def test_defaults_pass_for_every_stage():
    for stage in options_of("stage"):
        assert checks.field_problems(compose([f"stage={stage}"], check=False)) == []
        assert checks.cross_problems(compose([f"stage={stage}"], check=False)) == []


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lr=0", ["optim.lr=0", "above 0", "Set 0.001"]),
        ("optim.lr=nan", ["optim.lr=nan", "finite", "Set 0.001"]),
        ("optim.lr=inf", ["optim.lr=inf", "finite"]),
        ("train.max_steps=0", ["train.max_steps=0", "at least 1", "Set 100"]),
        ("train.micro_batch_size=-8", ["train.micro_batch_size=-8", "at least 1"]),
        ("arch.n_layers=0", ["arch.n_layers=0", "at least 1", "Set 4"]),
        ("arch.dropout=1.0", ["arch.dropout=1.0", "from 0 to below 1"]),
        ("optim.beta2=1", ["optim.beta2=1.0", "below 1", "Set 0.95"]),
        ("optim.weight_decay=-0.1", ["optim.weight_decay=-0.1", "negative"]),
        ("schedule.decay_fraction=0", ["schedule.decay_fraction=0.0", "above 0 and at most 1"]),
        ("generation.top_p=1.5", ["generation.top_p=1.5", "at most 1"]),
        ("generation.temperature=-1", ["generation.temperature=-1", "negative"]),
        ("train.precision=fp16", ["train.precision=fp16", "auto, fp32, bf16", "Set auto"]),
        ("hardware.device=gpu", ["hardware.device=gpu", "auto, cpu, cuda"]),
        ("run.seed=-1", ["run.seed=-1", "negative"]),
    ],
)
def test_a_value_by_itself(override, words):
    text = message(override)
    for word in words:
        assert word in text


def test_choices_of_a_stage():
    assert "must be one of last, likelihood" in message("stage=reward", "stage.head=first")
    text = message("stage=ppo", "stage.reward=llm")
    assert "stage.reward=llm is unknown" in text and "exact_match" in text and "MODULE:" in text
    assert "stage.kl_kind=k4 must be one of k1, k2, k3" in message("stage=grpo", "stage.kl_kind=k4")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["train.global_batch_size=100", "train.micro_batch_size=8"],
            ["train.global_batch_size=100", "micro_batch_size (8) x dp_size (1) = 8", "Set 96 or 104", "train.micro_batch_size=5."],
        ),
        (
            ["train.global_batch_size=4", "train.micro_batch_size=8"],
            ["train.global_batch_size=4", "Set 8.", "Or set train.micro_batch_size=4."],
        ),
        (
            ["train.seq_len=1024"],
            ["train.seq_len=1024", "arch.max_seq_len=512", "arch.max_seq_len=1024"],
        ),
        (["arch.n_heads=6", "arch.n_kv_heads=4"], ["arch.n_heads=6", "n_kv_heads=4", "1, 2, 3, 6"]),
        (["arch.d_model=250"], ["arch.d_model=250", "arch.n_heads=4", "Set arch.d_model to 248 or 252"]),
        (["arch.d_model=12"], ["arch.d_head=3", "odd", "Set 4"]),
        (["arch.d_head=33"], ["arch.d_head=33", "odd", "Set 34"]),
        (
            ["schedule.warmup_steps=100"],
            ["schedule.warmup_steps=100", "train.max_steps=100", "Set schedule.warmup_steps=10"],
        ),
        (
            ["stage=grpo", "stage.num_samples=6", "train.micro_batch_size=8"],
            ["train.global_batch_size=32", "stage.num_samples=6", "Set 30 or 36"],
        ),
        (["stage=grpo", "stage.num_samples=1"], ["stage.num_samples=1", "at least 2"]),
        (
            ["stage=ppo", "stage.rollout_batch_size=48"],
            ["stage.rollout_batch_size=48", "train.global_batch_size=32", "Set 32 or 64, or 0"],
        ),
        (["stage=ppo", "stage.reward=model"], ["stage.reward=model", "stage.reward_model=DIR"]),
        (
            ["stage=grpo", "stage.reward=exact_match", "stage.reward_url=http://a/b"],
            ["stage.reward_url='http://a/b'", "exact_match does not read it", "set stage.reward=http"],
        ),
        (
            ["stage=ppo", "stage.reward=a:b + regex", "stage.reward_pattern=x", "stage.reward_model=m"],
            ["stage.reward_model='m'", "set stage.reward=model"],
        ),
        (["stage=ppo", "generation.temperature=0"], ["generation.temperature=0", "temperature=1"]),
        (
            ["stage=ppo", "generation.max_new_tokens=512"],
            ["generation.max_new_tokens=512", "arch.max_seq_len=512", "at most 256"],
        ),
    ],
)  # fmt: skip
def test_values_against_each_other(overrides, words):
    text = message(*overrides)
    for word in words:
        assert word in text


def test_values_that_fit_each_other():
    compose(["arch.d_model=10", "arch.n_heads=3", "arch.n_kv_heads=3", "arch.d_head=4"])
    compose(["schedule.warmup_steps=99", "train.max_steps=100"])
    compose(["stage=ppo", "stage.rollout_batch_size=96"])
    compose(["stage=sft", "generation.temperature=0"])  # only learning from samples needs chance


def test_data_parallel_ranks_enter_the_batch():
    config = compose(["train.global_batch_size=32", "train.micro_batch_size=8"])
    assert checks.cross_problems(config, dp_size=4) == []
    (problem,) = checks.cross_problems(config, dp_size=3)
    assert "micro_batch_size (8) x dp_size (3) = 24" in problem and "Set 24 or 48" in problem


def test_all_problems_are_reported_together():
    text = message("train.global_batch_size=100", "train.micro_batch_size=8", "arch.n_kv_heads=3",
                   "train.seq_len=1024", "schedule.warmup_steps=500")  # fmt: skip
    assert text.startswith("4 problems:")
    for word in ("train.global_batch_size=100", "n_kv_heads=3", "seq_len=1024", "warmup_steps=500"):
        assert word in text
    text = message("optim.lr=0", "train.max_steps=0", "train.global_batch_size=7")
    assert text.startswith("2 problems:")  # the batch cannot be judged before each value holds


def test_the_stage_needs_its_records():
    text = training_message("stage=pretrain", "data=skills")
    for word in ("stage=pretrain", "documents", "data=skills", "dialogues and pairs and prompts",
                 "Set data=file or data=shards or data=stdlib"):  # fmt: skip
        assert word in text
    assert "prompts" in training_message("stage=grpo", "data=stdlib")
    checks.check_training(compose(["stage=sft", "data=skills"]))
    checks.check_training(compose(["stage=sft", "data=file", "data.path=x"]))


def test_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    text = training_message("hardware.device=cuda")
    assert "hardware.device=cuda" in text and "WORLD_SIZE" in text
    assert "C compiler" in training_message("engine.compile=true")
    assert "distllm[wandb]" in training_message("tracking=wandb")
    monkeypatch.setenv("WORLD_SIZE", "1")
    checks.check_training(compose([]))


@pytest.mark.parametrize(
    "settings, words",
    [
        (["arch.n_heads=5", "arch.n_kv_heads=5", "arch.d_model=160"], "does not divide arch.n_heads=5"),
        (["arch=qwen3_30b_a3b"], "cannot be combined with experts"),
        (["arch.qk_norm=full"], "cannot be combined with arch.qk_norm=full"),
        (["engine.compile=true", "engine.activation_checkpointing=selective"], "would leave nothing compiled"),
    ],
)  # fmt: skip
def test_what_tensor_parallel_cannot_split_is_refused(monkeypatch, settings, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ["engine=fsdp", "engine.mesh.tp_size=2"]
    assert words in training_message(*asked, *settings)
    checks.check_training(compose([*asked, "engine.compile=true"]))


def test_directories_must_exist(tmp_path):
    missing = tmp_path / "nowhere"
    assert f"model={missing} is not a directory" in training_message(f"model={missing}")
    assert f"tokenizer={missing} is not" in training_message(f"tokenizer={missing}")
    text = training_message("stage=ppo", "data=skills", f"stage.reward_model={missing}")
    assert f"stage.reward_model={missing} is not a directory" in text


def test_the_models_own_length_counts(tmp_path):
    options = DecoderOptions(vocab_size=300, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8)
    options.max_seq_len = 48
    save_model(Decoder(options), None, tmp_path / "model")
    override = f"model={tmp_path / 'model'}"
    text = training_message(override, "train.seq_len=64")
    assert (
        "train.seq_len=64" in text and "max_seq_len=48" in text and "Set train.seq_len=48" in text
    )
    checks.check_training(compose([override, "train.seq_len=48", "arch.max_seq_len=32"]))


def test_checks_change_nothing():
    config = compose(["run.dir=x"])
    before = compose(["run.dir=x"])
    checks.check_training(config)
    assert config == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.rank=4"], ["adapter.rank=4 has no effect with adapter=none", "Set adapter=lora"]),
        (["adapter=lora", "adapter.rank=0"], ["adapter.rank=0 must be at least 1", "Set 8"]),
        (["adapter=lora", "adapter.dropout=1"], ["adapter.dropout=1.0 must be from 0 to below 1"]),
        (["adapter=lora", "adapter.base_bits=8"], ["adapter.base_bits=8 must be 4 or 32"]),
        (["adapter=lora", "stage=dpo", "adapter.dropout=0.1"], ["adapter.dropout=0.1 with stage=dpo", "Set adapter.dropout=0"]),
        (["adapter=lora", "adapter.base_bits=4", "engine=fsdp"], ["adapter.base_bits=4 with engine=fsdp", "single or ddp"]),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be(overrides, words):
    text = message(*overrides)
    assert all(word in text for word in words), text


def test_an_adapter_needs_its_packages_and_a_model_to_stand_beside(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = training_message("adapter=lora", "adapter.base_bits=4", "hardware.device=cpu")
    for word in ('pip install "distllm[peft]"', 'pip install "distllm[qlora]"', "Set model=DIR"):
        assert word in text
