"""When every response is worth the same, nothing moves, the steps are counted, and it is said."""

import pytest
import torch

from distllm import registry
from distllm.pipeline.reinforcement import keep_samples
from distllm.rl.objective import PolicyObjective
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.tracking.base import make_trackers
from distllm.tracking.options import TrackingOptions
from distllm.tracking.report_data import load_run
from distllm.tracking.watch import Watch
from distllm.train.loop import Loop
from distllm.train.options import TrainOptions

NUM_LEARNED, NUM_EQUAL = 2, 6
POLICY_ONLY = [n for n in registry.names("algorithm") if not registry.get("algorithm", n).trains_value]  # fmt: skip


def train(name, folder):
    """Learn from rewards that differ, then from rewards of 0.1 each; return the weights between and after, and the stage."""
    engine = single_engine(tiny_decoder(vocab_size=16), "policy", weight_decay=0.1)
    tracker = make_trackers(TrackingOptions(), folder, True, {})
    watch = Watch(tracker, is_main=True, max_steps=NUM_LEARNED + NUM_EQUAL)
    found = []

    def snapshot():
        return torch.cat([p.detach().flatten().clone() for p in engine.model.parameters()])

    def judge(prompt, response):
        return 0.1 if len(found) else float(len(response))

    options = TrainOptions(
        global_batch_size=8,
        micro_batch_size=8,
        max_steps=NUM_LEARNED + NUM_EQUAL,
        log_every_steps=1,
    )
    source = make_source(
        name, {"policy": engine}, [[1], [2, 3]], judge, end_id=15, max_new_tokens=6, batch_size=8,
        kl_coef=0.0, overlong_buffer=0.0, num_samples=4,
    )  # fmt: skip
    source.on_rollouts = lambda *given: keep_samples(tracker, name, 8, *given)

    def progress(step, metrics):
        if step == NUM_LEARNED:
            found.append(snapshot())

    loop = Loop(
        options=options,
        stage=name,
        source=source,
        log=watch.log,
        evaluate=lambda step: {},
        save=lambda loop: None,
        stop_requested=lambda: False,
        progress=progress,
    )
    loop.run()
    tracker.close()
    return found[0], snapshot(), load_run(folder).stages[0]


@pytest.mark.parametrize("name", POLICY_ONLY)
def test_nothing_moves_and_it_is_said(name, tmp_path):
    between, after, stage = train(name, tmp_path)
    assert torch.equal(between, after)
    assert not torch.equal(between, torch.cat([p.flatten() for p in tiny_decoder(vocab_size=16).parameters()]))  # fmt: skip
    assert stage.curves["rl/reward_std"].values[-NUM_EQUAL:] == [0.0] * NUM_EQUAL
    if registry.get("algorithm", name).compares_group:
        assert stage.curves["rl/zero_spread"].values[-NUM_EQUAL:] == [1.0] * NUM_EQUAL
    said = next(a.text for a in stage.advice if a.name == "equal_rewards")
    assert "the last five logged steps has the reward 0.1: nothing can be learned" in said


def test_a_step_without_a_gradient_would_move_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(PolicyObjective, "pushes", lambda self, examples: True)  # the bug
    between, after, _ = train("grpo", tmp_path)
    assert not torch.equal(between, after)
