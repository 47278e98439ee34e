"""Lines of advice: each fires past its threshold and not before it, once per crossing, alike on console and in the report."""

import json
import logging

import pytest
from fake_runs import write_stage

from distllm.tracking.advice import REARM, RULES, Advisor
from distllm.tracking.report import write_report
from distllm.tracking.watch import Watch, describe

FIRST = {"train/loss": 0.001, "train/grad_norm": 0.8, "rl/ratio_mean": 1.0, "rl/clip_fraction": 0.0}
RISING = [{"rl/reward_mean": v, "rl/reward_std": 0.2} for v in (0, 0, 0, 0.3, 0.3, 0.3)]


def rows(base, **columns):
    """Spread columns over rows: lists give one value a row."""
    length = max(len(v) for v in columns.values())
    return [
        base[i] | {k.replace("__", "/"): v[i] for k, v in columns.items()} for i in range(length)
    ]


def constant(name, value, count=3):
    return [{name: value}] * count


NO_BASE = [{}] * 20
TOKENS = {"rl/response_tokens": 1000.0}
CASES = {
    "loss_near_zero": ([FIRST], [FIRST | {"train/loss": 0.5}], "0.001"),
    "negative_kl": (
        [TOKENS | {"rl/kl_k1": -0.1, "rl/kl_k2": 0.1}] * 5,
        [TOKENS | {"rl/kl_k1": -0.03, "rl/kl_k2": 0.1}] * 5,  # chance: 0.0063 a standard error
        "sampling and scoring distributions differ",
    ),
    "no_spread": (constant("rl/zero_spread", 0.71), constant("rl/zero_spread", 0.69), "71%"),
    "equal_rewards": (
        [{"rl/reward_std": 0.0, "rl/reward_mean": 0.25, "rl/unscored": 0.0}] * 5,
        [{"rl/reward_std": 0.0, "rl/reward_mean": 0.25, "rl/unscored": 0.0}] * 4,
        "0.25",
    ),
    "longer_for_reward": (
        rows(RISING, rl__response_length=[10, 10, 10, 15, 15, 15]),
        rows(RISING, rl__response_length=[10, 10, 10, 14, 14, 14]),
        "from 10 to 15",
    ),
    "reward_is_length": (
        constant("rl/reward_length_correlation", 0.81),
        constant("rl/reward_length_correlation", 0.79),
        "0.81",
    ),
    "entropy_collapse": (
        rows(NO_BASE, rl__entropy=[1, 1, 1, 0.09, 0.09, 0.09]),
        rows(NO_BASE, rl__entropy=[1, 1, 1, 0.11, 0.11, 0.11]),
        "from 1 to 0.09",
    ),
    "far_from_reference": (
        [{"eval/kl_ref": 10.0, "eval/response_length": 20.0}],
        [{"eval/kl_ref": 9.0, "eval/response_length": 20.0}],
        "0.50",
    ),
    "other_measure_fell": (
        [{"eval/exact_match": 0.5}, *RISING, {"eval/exact_match": 0.4}],
        [{"eval/exact_match": 0.5}, *RISING, {"eval/exact_match": 0.48}],
        "from 0.500 to 0.400",
    ),
    "truncated": (constant("rl/truncated", 0.5), constant("rl/truncated", 0.49), "50%"),
    "clipped": (constant("rl/clip_fraction", 0.31), constant("rl/clip_fraction", 0.29), "31%"),
    "few_effective_samples": (
        constant("rl/effective_sample_size", 0.49),
        constant("rl/effective_sample_size", 0.5),
        "49%",
    ),
    "sampler_mismatch": (
        constant("rl/sampler_kl", 2e-3),
        constant("rl/sampler_kl", 9e-4),
        "0.002",
    ),
    "useless_values": (
        constant("rl/explained_variance", -0.1, 10),
        constant("rl/explained_variance", 0.0, 10),
        "-0.10",
    ),
    "reward_errors": (
        constant("rl/reward_errors", 0.11),
        constant("rl/reward_errors", 0.09),
        "11%",
    ),
}


def advised(history):
    advisor = Advisor()
    return [advice for step, row in enumerate(history) for advice in advisor.look(step, row)]


def test_every_rule_has_a_case_and_a_name_of_its_own():
    assert sorted(CASES) == sorted({rule.name for rule in RULES})
    assert len({rule.message for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_past_its_threshold_and_not_before(name):
    beyond, within, words = CASES[name]
    said = advised(beyond)
    assert [advice.name for advice in said] == [name]
    assert words in said[0].text
    assert advised(within) == []


def test_a_crossing_is_told_once_until_the_curve_has_come_back():
    bad, good = [{"rl/truncated": 0.9}], [{"rl/truncated": 0.1}]
    assert len(advised(bad * 50)) == 1
    # Back for a moment, then over the line again: that is one crossing.
    assert len(advised(bad * 5 + good * 3 + bad * 5)) == 1
    assert len(advised(bad * 5 + good * (REARM + 3) + bad * 5)) == 2
    late = FIRST | {"train/loss": 0.5}
    assert len(advised([FIRST] + [late] * 20 + [FIRST])) == 1  # a note comes once a run


def test_absent_and_non_finite_values_say_nothing():
    assert (
        advised([{"rl/truncated": "NaN", "stage": "grpo", "rl/entropy": float("nan")}] * 12) == []
    )


class Recorder:
    def __init__(self):
        self.rows = []

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))


def test_console_and_report_say_the_same_and_a_resumed_run_does_not_repeat_it(tmp_path, caplog):
    import random

    write_stage(tmp_path / "run", "ppo", 1, random.Random(0), 0.0)
    path = tmp_path / "run" / "metrics.jsonl"
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    with caplog.at_level(logging.INFO, logger="distllm"):
        logging.getLogger("distllm").propagate = True
        watch = Watch(Recorder(), is_main=True, max_steps=60)
        for row in logged:
            watch.log(row["step"], row)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "groups have no spread" in warnings[0]
    step, text = warnings[0].removeprefix("step ").split(": ", 1)
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert f"<b>step {step}</b>" in page and text in page
    assert [r for r in caplog.records if "seconds" not in r.getMessage()]

    caplog.clear()
    again = Watch(Recorder(), is_main=True, max_steps=60)
    again.recall(path)
    again.log(61, logged[-1])
    assert [r for r in caplog.records if r.levelno == logging.WARNING] == []

    silent = Watch(Recorder(), is_main=False, max_steps=60)
    caplog.clear()
    for row in logged:
        silent.log(row["step"], row)
    assert caplog.records == [] and len(silent.tracker.rows) == len(logged)


def test_the_line_of_numbers_names_what_was_logged_and_nothing_else():
    line = describe(
        {"stage": "ppo", "rl/reward_mean": 0.5, "rl/reward_std": 0.25, "rl/kl_k1": 0.01, "rl/kl_k2": 0.02,
         "rl/kl_k3": 0.03, "rl/truncated": 0.125, "rl/zero_spread": 0.5, "time/sample_s": 1.5}
    )  # fmt: skip
    assert line == (
        "reward 0.500 ± 0.250 · per token k1 0.0100 · k2 0.0200 · k3 0.0300 · truncated 12% · "
        "groups without spread 50% · sample 1.50 s"
    )
