"""The demo at full size, on seeds of its own: at least two of three reach every bar of its table. Takes minutes each."""

import json

import pytest

from distllm.config.compose import compose
from distllm.pipeline.run import run_pipeline
from distllm.pipeline.stage import run_stage
from distllm.pipeline.table import KL_BOUND

# Chosen before they were run; the demo's settings were chosen on 0, 1, 11, 12 and 13.
SEEDS = (21, 22, 23)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run the demo on every seed; return each one's table and the stages' results."""
    found = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"demo-{seed}")
        config = compose(["pipeline=demo", f"run.dir='{folder}'", f"run.seed={seed}"])
        assert run_pipeline(config).finished
        summary = json.loads((folder / "pipeline.json").read_text())
        results = {
            s["name"]: json.loads((folder / s["dir"] / "result.json").read_text())
            for s in summary["stages"]
        }
        results["ppo-rule"] = {"metrics": ppo_against_the_rule(config, folder, seed)}
        found.append((summary, results))
    return found


def ppo_against_the_rule(config, folder, seed):
    """Run the demo's PPO stage from the SFT model, judged by exact match instead of the reward model."""
    stage = next(s for s in config.pipeline.stages if s.name == "ppo")
    settings = [
        *config.pipeline.shared,
        *stage.overrides,
        "stage.kl_coef=0.01",
        "optim.lr=1e-4",
        f"model='{folder}/sft/model'",
        f"run.dir='{folder}-rule'",
        f"run.seed={seed}",
    ]
    return run_stage(compose(settings)).metrics


def in_two_of_three(outcomes, holds):
    """Count the seeds on which a condition holds, and show the others' values."""
    verdicts = [holds(summary, results) for summary, results in outcomes]
    assert sum(bool(ok) for ok, _ in verdicts) >= 2, [value for _, value in verdicts]


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestDemo:
    def test_pretraining_is_a_quarter_below_the_unigram_entropy(self, outcomes):
        def holds(summary, results):
            m = results["pretrain"]["metrics"]
            return m["after/loss"] <= 0.75 * m["baseline/unigram"], m

        in_two_of_three(outcomes, holds)

    def test_sft_answers_a_quarter_and_four_times_more_than_before(self, outcomes):
        def holds(summary, results):
            m = results["sft"]["metrics"]
            before, after = m["before/exact_match"], m["after/exact_match"]
            return after > 0.25 and after >= 4 * before, (before, after)

        in_two_of_three(outcomes, holds)

    def test_the_reward_model_beats_chance_corruption_and_likelihood(self, outcomes):
        def holds(summary, results):
            m = results["reward"]["metrics"]
            return (
                m["after/accuracy"] > 0.75
                and m["after/accuracy_corrupted"] > 0.85
                and m["after/accuracy"] > m["baseline/likelihood_accuracy"]
                and m["after/share_sampled"] >= 0.5
                and m["after/length_only_accuracy"] < 0.6
            ), m

        in_two_of_three(outcomes, holds)

    def test_ppo_raises_the_reward_models_score_within_its_bounds(self, outcomes):
        def holds(summary, results):
            m = results["ppo"]["metrics"]
            fell = m["before/exact_match"] - m["after/exact_match"]
            return (m["gain/reward_low"] > 0 and m["after/kl_ref"] < KL_BOUND and fell <= 0.02), m

        in_two_of_three(outcomes, holds)

    def test_ppo_against_the_rule_raises_exact_match_by_eight_points(self, outcomes):
        def holds(summary, results):
            m = results["ppo-rule"]["metrics"]
            gain = m["after/exact_match"] - m["before/exact_match"]
            return gain >= 0.08, gain

        in_two_of_three(outcomes, holds)

    def test_grpo_raises_exact_match_by_ten_points_and_beats_more_sft(self, outcomes):
        def holds(summary, results):
            m, control = results["grpo"]["metrics"], results["control"]["metrics"]
            gain = m["after/exact_match"] - m["before/exact_match"]
            lead = m["after/exact_match"] - control["after/exact_match"]
            enough = results["control"]["wall_s"] >= 0.9 * results["grpo"]["wall_s"]
            return gain >= 0.10 and lead >= 0.05 and enough, (
                gain,
                lead,
                results["control"]["wall_s"],
            )

        in_two_of_three(outcomes, holds)

    def test_the_table_says_the_same(self, outcomes):
        in_two_of_three(
            outcomes,
            lambda summary, _: (
                all(r["ok"] is not False for r in summary["table"]),
                summary["table"],
            ),
        )
