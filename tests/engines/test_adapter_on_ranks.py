"""A run through an adapter under every engine that takes one, handed from one to the next; the others say why not."""

import json
from pathlib import Path

import pytest
import torch
from crossing import stretch
from safetensors.torch import load_file

from distllm.config.checks import cross_problems
from distllm.config.compose import compose
from distllm.errors import ConfigError
from distllm.testing.gloo import run_on
from distllm.testing.stages import SKILLS, tiny_model

pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(600)

HERE = Path(__file__).parent
COMMON = [
    *SKILLS,
    "adapter=lora",
    "adapter.rank=2",
    "train.max_steps=6",
    "train.micro_batch_size=2",
    "train.log_every_steps=1",
    "train.save_every_steps=2",
    "train.num_eval_samples=4",
    "optim.lr=1e-2",
]
STAGES = {
    "dpo": ["stage=dpo", "stage.reference=live"],
    "reward": ["stage=reward", "stage.head=last"],
}
SINGLE, DDP, FSDP = (["engine=single"], ["engine=ddp"], ["engine=fsdp"])


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {m["step"]: m["train/loss"] for m in lines if "train/loss" in m}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run each stage undisturbed on one process, and on two through DDP, FSDP and DDP again, in one launch."""
    folder = tmp_path_factory.mktemp("adapters")
    model = f"model='{tiny_model(folder)}'"
    stretches = []
    for name, own in STAGES.items():
        settings = [*COMMON, *own, model]
        (folder / name).mkdir()
        assert stretch(folder / name / "whole", [*settings, *SINGLE])
        parts = str(folder / name / "parts")
        stretches += [
            [parts, [*settings, *engine], steps]
            for engine, steps in ((DDP, 2), (FSDP, 2), (DDP, None))
        ]
    found = run_on(2, "crossing:relay", {"stretches": stretches}, path=[HERE], timeout_s=500)
    assert found == [[False, False, True] * len(STAGES)] * 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_one_loss_curve_whatever_the_engine(name, runs):
    whole, parts = (runs / name / which for which in ("whole", "parts"))
    expected, got = losses(whole), losses(parts)
    assert list(expected) == list(got) == [1, 2, 3, 4, 5, 6]
    assert got == pytest.approx(expected, rel=2e-5)
    assert max(expected.values()) - min(expected.values()) > 1e-3, "it learns"
    first, second = (load_file(p / "model" / "model.safetensors") for p in (whole, parts))
    assert first.keys() == second.keys()
    for tensor_name, tensor in first.items():
        torch.testing.assert_close(second[tensor_name], tensor, rtol=0, atol=2e-4, msg=tensor_name)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (["engine=deepspeed"], ["engine=deepspeed", "lays out every weight", "single, ddp, fsdp"]),
        (["engine=accelerate"], ["engine=accelerate", "single, ddp, fsdp"]),
        ([*FSDP, "engine.mesh.tp_size=2"], ["engine.mesh.tp_size=2", "Set engine.mesh.tp_size=1"]),
    ],
)
def test_an_engine_that_takes_no_adapter_says_why(engine, words):
    problems = "\n".join(cross_problems(compose([*engine, "adapter=lora"], check=False)))
    assert all(word in problems for word in words), problems
    with pytest.raises(ConfigError):
        compose([*engine, "adapter=lora"])
    compose(engine)
