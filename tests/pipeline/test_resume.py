"""Ten steps equal five, a stop, a resume and five more, bit for bit, in every stage."""

import json

import pytest

from distllm.testing.stages import (
    SKILLS,
    StopAfter,
    run_tiny,
    timeless_metrics,
    weights_hash,
    write_text,
)

HARD = [
    "arch.dropout=0.1",
    "train.max_steps=10",
    "train.micro_batch_size=4",
    "train.log_every_steps=3",
    "train.eval_every_steps=4",
    "train.save_every_steps=3",
    "schedule=cosine",
    "schedule.warmup_steps=3",
    "optim.lr=0.01",
]
"""Dropout, accumulation, warm-up, and cadences that do not fall together."""

VARIED = [
    "stage.reward=regex",
    "stage.reward_pattern='[a-m]'",
    "stage.reward_workers=1",
    "stage.reward_timeout_s=120",
]
"""A reward that differs between responses: where all are equal nothing is learned."""

STAGES = {
    "sft": ["stage=sft", *SKILLS],  # 24 samples, 8 a step: three steps an epoch
    "reward": ["stage=reward", *SKILLS],
    "ppo": [
        "stage=ppo",
        *SKILLS,
        "stage.rollout_batch_size=16",  # four updates a batch of rollouts: the stop falls between two
        "stage.target_kl=0.01",
        "stage.kl_horizon=100",
        "stage.value_warmup_steps=2",
        *VARIED,
    ],
    "grpo": [
        "stage=grpo",
        *SKILLS,
        "stage.num_samples=4",
        "stage.kl_coef=0.1",
        "stage.num_epochs=3",
        *VARIED,
    ],
}


def same_checkpoint(a, b, step=10):
    """Compare weights, moments, generators and the state, wall time aside."""
    first, second = (r / "checkpoints" / f"step_{step:08d}" for r in (a, b))
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    states = [json.loads((p / "state.json").read_text()) for p in (first, second)]
    for state in states:
        for clock in ("train_s", "peak_flops_per_s"):
            state["notes"].pop(clock)
        state.pop("tracker")  # byte offsets: the lines hold times of varying length
        sums = state["meters"]["sums"]
        state["meters"]["sums"] = {k: v for k, v in sums.items() if not k.startswith("time/")}
    assert states[0] == states[1]


@pytest.fixture(scope="module", params=["pretrain", *STAGES])
def undisturbed(request, tmp_path_factory, parent):
    """Run ten steps of a stage; return its name, its settings and its directory."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "pretrain":
        text = write_text(folder / "text.txt")
        settings = ["stage=pretrain", "data=file", f"data.path='{text}'"]
    else:
        settings = [*STAGES[request.param], f"model='{parent}'"]
    settings += HARD
    assert run_tiny(folder / "whole", settings).finished
    return request.param, settings, folder / "whole"


@pytest.mark.parametrize("stop_after", [5, 1])
def test_a_stop_and_a_resume_change_nothing(undisturbed, tmp_path, stop_after):
    _, settings, whole = undisturbed
    folder = tmp_path / "parts"
    assert not run_tiny(folder, settings, StopAfter(stop_after)).finished
    assert not (folder / "result.json").exists()
    assert run_tiny(folder, settings).finished
    same_checkpoint(whole, folder)
    assert timeless_metrics(whole) == timeless_metrics(folder)
    assert weights_hash(whole) == weights_hash(folder)
    samples = [(r / "samples.jsonl") for r in (whole, folder)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_bytes() == samples[1].read_bytes()


def test_the_comparison_would_notice_another_seed(undisturbed, tmp_path):
    """The test can fail: a run that differs in its seed alone ends elsewhere."""
    _, settings, whole = undisturbed
    other = tmp_path / "other"
    run_tiny(other, [*settings, "run.seed=1"])
    assert weights_hash(whole) != weights_hash(other)


def test_a_finished_run_is_left_alone(undisturbed):
    _, settings, whole = undisturbed
    before = {p: p.stat().st_mtime_ns for p in (whole / "model").iterdir()}
    assert run_tiny(whole, settings).finished
    assert before == {p: p.stat().st_mtime_ns for p in (whole / "model").iterdir()}
