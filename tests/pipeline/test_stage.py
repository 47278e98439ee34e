"""What a finished stage leaves behind, and that nothing of it needs a network."""

import json
import math
import socket
import string
from unittest import mock

import pytest
import torch
from test_resume import VARIED

from distllm.arch.io import load_model
from distllm.pipeline.stage import summarise
from distllm.pipeline.table import _rl
from distllm.rl.environments.calculator import Calculator
from distllm.testing.stages import SKILLS, run_tiny, weights_hash

SFT = ["stage=sft", *SKILLS, "train.max_steps=4", "train.log_every_steps=2"]


@pytest.fixture
def no_network(monkeypatch):
    """Make every attempt to reach out an error."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_training_and_export_reach_for_no_network(tmp_path, parent, no_network):
    with pytest.raises(AssertionError):
        socket.create_connection(("127.0.0.1", 9))
    assert run_tiny(tmp_path / "run", [*SFT, f"model='{parent}'"]).finished
    load_model(tmp_path / "run" / "model")


def test_transformers_loads_the_result_with_the_same_logits(tmp_path, parent):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_tiny(tmp_path / "run", [*SFT, f"model='{parent}'"])
    folder = tmp_path / "run" / "model"
    ours, tokenizer = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("Return the value of the named attribute.")])
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    assert difference <= 1e-4
    chat = [{"role": "user", "content": "Copy: some words"}]
    same = AutoTokenizer.from_pretrained(folder)
    assert same.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert theirs.generation_config.eos_token_id is not None


def test_the_record_says_where_a_model_comes_from(tmp_path, parent):
    run_tiny(tmp_path / "first", [*SFT, f"model='{parent}'"])
    first = tmp_path / "first"
    run_tiny(
        tmp_path / "second", ["stage=grpo", *SKILLS, "train.max_steps=2", f"model='{first}/model'"]
    )
    lineage = json.loads((tmp_path / "second" / "lineage.json").read_text())
    assert lineage["parent"] == {"dir": f"{first}/model", "sha256": weights_hash(first)}
    assert lineage["data"]["name"] == "skills" and len(lineage["data"]["fingerprint"]) == 64
    assert lineage["seed"] == 0 and lineage["versions"]["torch"] == torch.__version__


def test_metrics_and_result_have_the_promised_names(tmp_path, parent):
    run_tiny(
        tmp_path / "run",
        [
            "stage=ppo",
            *SKILLS,
            *VARIED,
            "train.max_steps=4",
            "train.log_every_steps=2",
            f"model='{parent}'",
        ],
    )
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = next(x for x in lines if "train/loss" in x)
    assert trained["stage"] == "ppo" and trained["step"] == 2
    for name in (
        "perf/tokens_per_s", "mem/peak_gib", "rl/reward_mean", "rl/kl_ref", "rl/entropy",
        "rl/response_length", "rl/clip_fraction", "value/loss", "rl/reward_std", "rl/kl_k1", "rl/kl_k2", "rl/kl_k3",
        "rl/clip_low", "rl/clip_high", "rl/explained_variance", "rl/truncated", "rl/effective_sample_size",
        "rl/sampler_mismatch", "rl/sampler_kl", "time/sample_s", "time/reward_s", "time/prepare_s", "time/update_s",
    ):  # fmt: skip
        assert name in trained, name
    phases = sum(trained[f"time/{name}_s"] for name in ("sample", "reward", "prepare", "update"))
    assert 0.8 < phases / trained["perf/step_s"] <= 1
    assert 0 < trained["rl/effective_sample_size"] <= 1
    assert any("eval/exact_match" in x for x in lines)
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {x["step"] for x in samples if x["when"] == "train"} == {1, 3}  # two updates each
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["stage"] == "ppo" and result["steps"] == 4 and result["num_parameters"] > 0


def test_a_dropped_dropout_changes_nothing_in_rl(tmp_path, parent):
    """Policy and reference must agree at the start, so dropout is off in RL."""
    settings = ["stage=grpo", *SKILLS, "train.max_steps=2", f"model='{parent}'"]
    run_tiny(tmp_path / "with", [*settings, "arch.dropout=0.5"])
    run_tiny(tmp_path / "without", settings)
    assert weights_hash(tmp_path / "with") == weights_hash(tmp_path / "without")


def test_an_environment_answers_within_the_responses(tmp_path, parent):
    """The policy of random weights hardly ever asks, so every letter is made to count as a question."""
    letters = tuple(string.ascii_lowercase)
    always = {"stop": letters, "reply": lambda self, prompt, said: " 42"}
    settings = ["stage=grpo", *SKILLS, "train.max_steps=2", "stage.environment=calculator"]
    with mock.patch.multiple(Calculator, **always):
        run_tiny(tmp_path / "run", [*settings, "stage.max_turns=2", f"model='{parent}'"])
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["rl/turns"] >= 1 and 0 < rows[1]["rl/own_tokens"] < 1
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any("42" in x["response"] for x in samples if x["when"] == "train")


@pytest.mark.parametrize(
    "rewards, has_interval", [([math.nan], False), ([0.5], False), ([0.5, 0.25], True)]
)
def test_a_gain_without_a_spread_has_no_interval(rewards, has_interval):
    """And where nothing could be scored there is no reward, rather than one of 0."""
    before, after = ({"eval/rewards": [r + more for r in rewards]} for more in (0.0, 0.125))
    if not math.isnan(rewards[0]):
        before["eval/reward"], after["eval/reward"] = 0.5, 0.5
    merged = summarise(before, after)
    assert merged.get("gain/reward") == (None if math.isnan(rewards[0]) else 0.125)
    assert ("gain/reward_low" in merged) is ("gain/reward_high" in merged) is has_interval
    names = ["exact_match", "exact_match_low", "exact_match_high", "response_length"]
    level = {f"{when}/{name}": 0.5 for when in ("before", "after") for name in names}
    assert _rl("grpo", merged | level)[0]["ok"] is has_interval
