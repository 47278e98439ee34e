"""A response whose reward function failed is counted, logged and left out, and the step is made from the others."""

import math

import torch

from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.train.step import optimizer_step


class Flaky:
    """Cannot tell of the second response to each prompt; `problems` says why, as `rewards/base.py` asks for."""

    def __init__(self):
        self.problems = {}

    def score(self, prompts, rollouts, texts):
        self.problems = dict.fromkeys(
            range(1, len(texts), 4), "ZeroDivisionError: division by zero"
        )
        # Each text carries its ids, each message its prompt: a wrong pairing would change the score.
        self.heard = [(p.messages[-1]["content"], t) for p, t in zip(prompts, texts, strict=True)]
        return [
            math.nan if i in self.problems else float(len(r.response_ids))
            for i, r in enumerate(rollouts)
        ]

    def close(self):
        pass


def test_it_is_counted_logged_and_left_out(caplog):
    engine, reward = single_engine(tiny_decoder(), "policy"), Flaky()
    source = make_source(
        "grpo", {"policy": engine}, [[1], [2, 3]], reward, end_id=36, max_new_tokens=6, batch_size=8, num_samples=4
    )  # fmt: skip
    kept = []
    source.on_rollouts = lambda step, prompts, rollouts, texts: kept.extend(rollouts)
    work, metrics = source.next(0)
    assert metrics["rl/reward_errors"] == metrics["rl/unscored"] == 0.25
    assert "2 of 8 responses have no reward" in caplog.text
    assert "ZeroDivisionError: division by zero (2x)" in caplog.text
    assert [h for h, _ in reward.heard] == [str(r.prompt_ids) for r in kept]
    assert [t for _, t in reward.heard] == [" ".join(map(str, r.response_ids)) for r in kept]
    failed = [r for r in kept if math.isnan(r.score)]
    assert [(r.prompt_index, r.sample_index) for r in failed] == [
        (r.prompt_index, 1) for r in failed
    ]
    assert all((r.advantages == 0).all() for r in failed)
    assert any((r.advantages != 0).any() for r in kept)
    before = [p.detach().clone() for p in engine.model.parameters()]
    result = optimizer_step(engine, work[0].objective, work[0].micro_batches, 1e-2)
    assert math.isfinite(result.loss) and not result.skipped
    after = list(engine.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
