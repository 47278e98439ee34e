"""DeepSpeed's JSON follows from our settings; a user's own file may add to it, not contradict it."""

import json

import pytest
import torch

from distllm.config.checks import check_training
from distllm.config.compose import compose
from distllm.engines.deepspeed_config import DeepSpeedOptions, library_settings
from distllm.engines.options import BatchSizes
from distllm.errors import ConfigError
from distllm.optim.options import AdamWOptions

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a user's JSON and gives its path."""

    def write(content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def settings(dtype=torch.float32, optim=None, **changes):
    return library_settings(
        DeepSpeedOptions(**changes), optim or AdamWOptions(), BatchSizes(16, 2), CPU, dtype
    )


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")


def test_batch_arithmetic_precision_and_clipping(four):
    found, problems = settings(torch.bfloat16, AdamWOptions(max_grad_norm=0.3), zero_stage=1)
    assert problems == []
    assert found["train_batch_size"] == 16
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.3
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert found["fp16"] == {"enabled": False}
    assert found["zero_optimization"]["stage"] == 1
    assert "optimizer" not in found and "scheduler" not in found


def test_stage_0_keeps_fp32_weights():
    assert settings(torch.bfloat16, zero_stage=0)[0]["bf16"]["enabled"] is False


def test_offload_and_buckets():
    found, problems = settings(
        zero_stage=3, offload_optimizer=True, offload_param=True, bucket_mib=8
    )
    assert problems == []
    zero = found["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["offload_param"]["device"] == "cpu"
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 8 * 2**20 / 4


def test_deepspeed_takes_what_is_made():
    """The library's own parser, which knows every key, against every stage."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    for stage in range(4):
        found, _ = settings(zero_stage=stage, offload_optimizer=stage > 0, offload_param=stage == 3)
        parsed = config.DeepSpeedZeroConfig(**found["zero_optimization"])
        assert parsed.stage == stage
        assert parsed.reduce_bucket_size == 200 * 2**20 / 4
        assert (parsed.offload_optimizer.device == "cpu") == (stage > 0)


def test_a_file_adds(file):
    path = file(
        {
            "train_batch_size": "auto",
            "zero_optimization": {"stage": 2, "round_robin_gradients": True},
            "communication_data_type": "bf16",
            "wall_clock_breakdown": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        }
    )
    found, problems = settings(config=path)
    assert problems == []
    assert found["train_batch_size"] == 16
    assert found["zero_optimization"]["round_robin_gradients"] is True
    assert found["communication_data_type"] == "bf16"
    assert found["wall_clock_breakdown"] is True
    assert "optimizer" not in found


CONTRADICTIONS = {
    "stage": ({"zero_optimization": {"stage": 3}}, "=3", "engine.zero_stage=2"),
    "batch": ({"train_batch_size": 64}, "=64", "train.global_batch_size=16"),
    "micro batch": ({"train_micro_batch_size_per_gpu": 4}, "=4", "train.micro_batch_size=2"),
    "accumulation": ({"gradient_accumulation_steps": 3}, "=3", "1 processes makes it 8"),
    "clipping": ({"gradient_clipping": 0.5}, "=0.5", "optim.max_grad_norm=1.0"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16.enabled=true", "train.precision=fp32"),
    "bfloat16": ({"bfloat16": {"enabled": True}}, "bf16.enabled=true", "train.precision=fp32"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled=true", "train.precision=fp32"),
    "offload": (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        "=nvme",
        "engine.offload_optimizer=False",
    ),
    "sum": ({"gradient_allreduce_op": "sum"}, "=sum", "makes it mean"),
    "lr": ({"optimizer": {"params": {"lr": 0.1}}}, "=0.1", "optim.lr=0.001"),
    "betas": (
        {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
        "[0.9, 0.999]",
        "optim.beta2=0.95",
    ),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, "=Lamb", "optim=adamw"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "section scheduler", "schedule="),
    "foreign": ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", "engine=fsdp"),
    "not JSON": ("{", "is not JSON", "DeepSpeed JSON file"),
    "a list": ("[1]", "no JSON object", "DeepSpeed JSON file"),
    "no section": ({"bf16": True}, "bf16=true", "must be an object"),
    "misspelt": (
        {"zero_optimisation": {"stage": 1}},
        "zero_optimisation",
        "Write zero_optimization",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_names_both_values(file, name):
    content, theirs, ours = CONTRADICTIONS[name]
    path = file(content)
    _, problems = settings(config=path)
    assert len(problems) == 1
    assert path in problems[0] and theirs in problems[0] and ours in problems[0]


def test_a_section_that_says_nothing_changes_nothing(file):
    nothing = {"zero_optimization": {"offload_optimizer": None}, "bf16": {}, "fp16": None}
    for theirs in (nothing, {"zero_optimization": {}}, {"zero_optimization": None}):
        assert settings(config=file(theirs)) == settings()


def test_buckets_contradict_only_when_set_here(file):
    path = file({"zero_optimization": {"reduce_bucket_size": 5e8}})
    found, problems = settings(config=path)
    assert problems == [] and found["zero_optimization"]["reduce_bucket_size"] == 5e8
    (problem,) = settings(config=path, bucket_mib=1)[1]
    assert "500000000" in problem and "engine.bucket_mib=1 makes it 262144" in problem


@pytest.mark.parametrize(
    "setting, words",
    [
        ("engine.zero_stage=4", "must be 0, 1, 2 or 3"),
        ("engine.offload_param=true", "Set engine.zero_stage=3"),
        ("engine.offload_optimizer=true engine.zero_stage=0", "Set engine.zero_stage=1, 2 or 3"),
        ("engine.config=nowhere.json", "engine.config=nowhere.json cannot be read: No such file"),
    ],
)
def test_problems_are_reported_before_anything_is_built(setting, words):
    pytest.importorskip("deepspeed")
    with pytest.raises(ConfigError, match=words):
        check_training(compose(["engine=deepspeed", *setting.split(), "run.dir=unused"]))
