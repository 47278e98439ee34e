"""How stages are chained, what pairs are collected, and what the table says."""

from pathlib import Path

import pytest

from distllm.config.compose import compose
from distllm.errors import ConfigError
from distllm.pipeline.collect import mix
from distllm.pipeline.options import PipelineOptions, PipelineStage
from distllm.pipeline.run import job_config, plan_jobs
from distllm.pipeline.table import bars
from distllm.types import Pair, Prompt


def chain(**changes):
    stages = [
        PipelineStage(name="base"),
        PipelineStage(name="sft", parent="base"),
        PipelineStage(name="collect", kind="collect", parent="sft", per_round=True),
        PipelineStage(name="reward", parent="sft", pairs="collect", per_round=True),
        PipelineStage(name="ppo", parent="sft", reward_model="reward", per_round=True),
    ]
    return PipelineOptions(
        **({"name": "chain", "rounds": 2, "policy": "ppo", "stages": stages} | changes)
    )


def test_a_second_round_starts_from_the_policy_of_the_first():
    jobs = plan_jobs(chain(), Path("run"))
    assert [j.folder.name for j in jobs] == [
        "base", "sft", "collect", "reward", "ppo", "collect-2", "reward-2", "ppo-2",
    ]  # fmt: skip
    assert jobs[4].parent == Path("run/sft") and jobs[4].reward_model == Path("run/reward")
    for job in jobs[5:]:
        assert job.parent == Path("run/ppo") and job.round == 2
    assert jobs[6].pairs == Path("run/collect-2")
    assert jobs[7].reward_model == Path("run/reward-2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": []}, "has no stages"),
        ({"policy": ""}, r"rounds=2 needs pipeline\.policy"),
        (
            {"stages": [PipelineStage(name="a", parent="b")]},
            "parent=b, which is no stage before it",
        ),
        ({"stages": [PipelineStage(name="a"), PipelineStage(name="a")]}, "stage a twice"),
        ({"stages": [PipelineStage(name="a", kind="bake")]}, "kind=bake.*train, collect"),
    ],
)
def test_a_chain_that_cannot_run_is_refused_before_it_starts(changes, words):
    with pytest.raises(ConfigError, match=words):
        plan_jobs(chain(**changes), Path("run"))


def test_a_stage_takes_its_own_settings_and_what_the_pipeline_shares():
    config = compose(["pipeline=smoke", "run.dir=some place/x", "run.seed=7", "arch.d_ff=96"])
    jobs = {j.stage.name: j for j in plan_jobs(config.pipeline, Path(config.run.dir))}
    reward = job_config(config, jobs["reward"])
    assert reward.stage.name == "reward" and reward.stage.head == "likelihood"
    assert reward.data.name == "file" and reward.data.path == "some place/x/collect/train.jsonl"
    assert reward.model == "some place/x/sft/model" and reward.run.dir == "some place/x/reward"
    assert reward.run.seed == 7 and reward.arch.d_ff == 96 and reward.train.max_steps == 6
    assert job_config(config, jobs["ppo"]).stage.reward_model == "some place/x/reward/model"


def test_an_adapter_stands_beside_what_an_earlier_stage_has_learned():
    config = compose(["pipeline=smoke", "adapter=lora", "adapter.rank=3", "run.dir=x"])
    found = {
        job.stage.name: job_config(config, job).adapter
        for job in plan_jobs(config.pipeline, Path(config.run.dir))
        if job.stage.kind == "train"
    }
    assert found.pop("pretrain").name == "none", "it starts from random weights"
    assert {a.name for a in found.values()} == {"lora"} and {a.rank for a in found.values()} == {3}


def test_pairs_prefer_the_policys_own_mistakes_of_the_right_length():
    prompts = [Prompt(messages=[], answer=a) for a in ("12", "34", "56", "78")]
    corrupted = [Pair(prompt=[], chosen=p.answer, rejected="99", kind="corrupted") for p in prompts]
    answers = [["12", "1"], ["3", "35"], ["56", "56"], ["78", " 78 "]]
    pairs = mix(prompts, answers, corrupted)
    assert [(p.chosen, p.rejected, p.kind) for p in pairs] == [
        ("12", "1", "sampled"),
        ("34", "35", "sampled"),  # as long as the right answer
        ("56", "99", "corrupted"),
        ("78", "99", "corrupted"),
    ]
    fewer = mix(prompts[1:], [["35"], ["56"], ["78"]], corrupted[1:])
    assert [p.kind for p in fewer] == ["sampled", "corrupted"]  # never more corrupted than sampled


def result(stage, **metrics):
    return {
        "stage": stage,
        "wall_s": 10.0,
        "metrics": {k.replace("__", "/"): v for k, v in metrics.items()},
    }


def match(before, after):
    return {
        "before__exact_match": before,
        "after__exact_match": after,
        "after__exact_match_low": after - 0.05,
        "after__exact_match_high": after + 0.05,
    }


def rl(before, after, reward):
    return match(before, after) | {
        "before__reward": 0.0,
        "after__reward": reward,
        "gain__reward": reward,
        "gain__reward_low": reward - 0.1,
        "gain__reward_high": reward + 0.1,
        "before__response_length": 2.0,
        "after__response_length": 2.0,
    }


def verdicts(rows):
    return {(r["stage"], r["metric"]): r["ok"] for r in rows}


def test_the_table_judges_each_bar():
    good = {
        "pretrain": result(
            "pretrain", after__loss=4.0, before__loss=8.0, before__bits_per_byte=3.0,
            after__bits_per_byte=1.5, baseline__unigram=6.0, baseline__kneser_ney_5=3.5,
        ),
        "sft": result("sft", **match(0.05, 0.5)),
        "grpo": result("grpo", **rl(0.5, 0.65, 0.5)),
        "control": result("sft", **match(0.5, 0.55)),
        "ppo": result("ppo", **rl(0.5, 0.49, 0.5)) | {"reward": "model"},
    }  # fmt: skip
    rows = bars(good)
    assert all(ok is not False for ok in verdicts(rows).values())
    note = next(r["note"] for r in rows if r["metric"] == "held-out nats per token")
    assert "the n-gram is ahead" in note and "3.500" in note
    assert "10 s against GRPO's 10 s" in next(r["note"] for r in rows if r["stage"] == "control")


@pytest.mark.parametrize(
    ("name", "bad", "metric"),
    [
        ("sft", result("sft", **match(0.2, 0.5)), "exact match"),
        ("grpo", result("grpo", **rl(0.5, 0.59, 0.5)), "exact match"),
        ("grpo", result("grpo", **rl(0.5, 0.65, 0.05)), "reward"),
        ("ppo", result("ppo", **rl(0.5, 0.47, 0.5)) | {"reward": "model"}, "exact match"),
    ],
)
def test_a_missed_bar_is_shown_as_missed(name, bad, metric):
    assert verdicts(bars({name: bad}))[name, metric] is False
