"""The recipes for real data sets, each command as it is documented: shortened, and in full where a figure is claimed."""

import json

import pytest
from shared_data import ROOT, minilm, shared

from distllm.cli.main import main

SHORT = [
    "train.max_steps=2",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "train.num_eval_samples=4",
    "generation.max_new_tokens=6",
    "schedule.warmup_steps=0",
]


def recipe(tmp_path, monkeypatch, name, *more):
    """Run `distllm pipeline experiment=NAME` with few and small steps; return what each stage reported."""
    monkeypatch.setenv("DISTLLM_SHARED_DATA", str(ROOT))
    from distllm.pipeline import run

    real = run.job_config

    def short(config, job):
        return real(config, _shortened(job))

    monkeypatch.setattr(run, "job_config", short)
    folder = tmp_path / name
    tiny = ["arch.n_layers=1", "hardware.threads=1"]
    assert main(["pipeline", f"experiment={name}", f"run.dir={folder}", *tiny, *more]) == 0
    summary = json.loads((folder / "pipeline.json").read_text())
    return {
        s["name"]: json.loads((folder / s["dir"] / "result.json").read_text())
        for s in summary["stages"]
    }


def _shortened(job):
    from dataclasses import replace

    return replace(job, stage=replace(job.stage, overrides=[*job.stage.overrides, *SHORT]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*are left out")
def test_gsm8k(tmp_path, monkeypatch):
    shared("gsm8k", "train.jsonl")
    stages = recipe(tmp_path, monkeypatch, "gsm8k")
    assert list(stages) == ["sft", "grpo"]
    assert "after/exact_match" in stages["sft"]["metrics"]
    assert 0 <= stages["grpo"]["metrics"]["after/reward"] <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*are left out", "ignore:.*is partly memory")
@pytest.mark.parametrize(
    ("name", "file", "metrics"),
    [
        (
            "hh",
            ("hh_rlhf", "harmless_test.jsonl.gz"),
            {"reward": "after/accuracy", "dpo": "after/accuracy"},
        ),
        ("sst2", ("sst2", "train.txt"), {"classify": "after/accuracy", "grpo": "after/reward"}),
        ("scan", ("scan", "train.txt"), {"sft": "after/exact_match", "grpo": "after/exact_match"}),
    ],
)
def test_recipes(tmp_path, monkeypatch, name, file, metrics):
    shared(*file)
    stages = recipe(tmp_path, monkeypatch, name)
    for stage, metric in metrics.items():
        assert 0 <= stages[stage]["metrics"][metric] <= 1, (stage, stages[stage]["metrics"])


def whole(tmp_path, monkeypatch, *overrides):
    """Run `distllm train` in full; return the metrics it reported."""
    monkeypatch.setenv("DISTLLM_SHARED_DATA", str(ROOT))
    folder = tmp_path / "run"
    assert main(["train", *overrides, f"run.dir={folder}", "hardware.threads=1"]) == 0
    return json.loads((folder / "result.json").read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_decoder_learns_shakespeare_as_well_as_nanogpt(tmp_path, monkeypatch):
    shared("tinyshakespeare", "input.txt")
    metrics = whole(tmp_path, monkeypatch, "experiment=shakespeare_char")
    assert metrics["baseline/kneser_ney_7"] < 1.52
    assert metrics["after/loss"] <= 1.88


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_an_encoder_decoder_learns_scan(tmp_path, monkeypatch):
    shared("scan", "train.txt")
    metrics = whole(tmp_path, monkeypatch, "experiment=scan_sft", "train.num_eval_samples=4182")
    assert metrics["before/exact_match"] < 0.01
    assert metrics["after/exact_match"] > 0.95


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.filterwarnings("ignore:.*is partly memory")
def test_minilm_learns_sentiment(tmp_path, monkeypatch):
    shared("sst2", "test.txt")
    metrics = whole(tmp_path, monkeypatch, "experiment=sst2_minilm", f"model={minilm()}")
    assert metrics["before/accuracy"] < 0.6
    assert metrics["after/accuracy"] > 0.874


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.filterwarnings("ignore:.*are left out", "ignore:.*is partly memory")
def test_a_decoder_learns_to_write_what_an_encoder_likes(tmp_path, monkeypatch):
    shared("sst2", "train.txt")
    monkeypatch.setenv("DISTLLM_SHARED_DATA", str(ROOT))
    command = ["pipeline", "experiment=sst2", f"run.dir={tmp_path}", "hardware.threads=1"]
    assert main(command) == 0
    stages = json.loads((tmp_path / "pipeline.json").read_text())["stages"]
    found = {
        s["name"]: json.loads((tmp_path / s["dir"] / "result.json").read_text())["metrics"]
        for s in stages
    }
    assert found["classify"]["after/accuracy"] > 0.7
    assert found["grpo"]["gain/reward_low"] > 0
