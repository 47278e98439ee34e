"""A reward that is hacked on purpose shows in the report; the same policy under an honest reward raises no such alarm.

Both runs are the whole loop: GRPO on a tiny decoder, its metrics written to a run directory and read back by the report.
"""

from distllm.pipeline.reinforcement import keep_samples
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.tracking.base import make_trackers
from distllm.tracking.options import TrackingOptions
from distllm.tracking.report import write_report
from distllm.tracking.report_data import load_run
from distllm.tracking.watch import Watch
from distllm.train.loop import Loop
from distllm.train.options import TrainOptions

VOCAB, END, FAVOURITE = 16, 15, 7
NUM_STEPS, BUDGET, LR = 40, 24, 1e-2
HACKED = {"longer_for_reward", "entropy_collapse", "far_from_reference", "reward_is_length"}


def longer_is_better(prompt, response):
    """A reward model's blind spot: each of its favourite words counts, so more words are better."""
    return response.count(FAVOURITE) + 0.1 * len(response)


def starts_right(prompt, response):
    """An honest one: the answer begins with an even id; what follows is free."""
    return float(response[0] % 2 == 0)


def train(folder, judge):
    """Run `NUM_STEPS` of GRPO and return what the report tells."""
    model = tiny_decoder(vocab_size=VOCAB, init_std=0.05)
    engines = {
        "policy": single_engine(model, "policy", lr=LR),
        "reference": single_engine(
            tiny_decoder(vocab_size=VOCAB, init_std=0.05), "reference", trained=False
        ),
    }
    options = TrainOptions(
        global_batch_size=32, micro_batch_size=32, max_steps=NUM_STEPS, log_every_steps=1
    )
    source = make_source(
        "grpo",
        engines,
        [[1 + i] for i in range(4)],
        judge,
        end_id=END,
        max_new_tokens=BUDGET,
        batch_size=32,
        lr=LR,
        num_samples=8,
        kl_coef=0.1,
    )
    tracker = make_trackers(TrackingOptions(), folder, True, {})
    source.on_rollouts = lambda *given: keep_samples(tracker, "grpo", 8, *given)
    watch = Watch(tracker, is_main=True, max_steps=NUM_STEPS)
    loop = Loop(
        options=options,
        stage="grpo",
        source=source,
        log=watch.log,
        evaluate=lambda step: {},
        save=lambda loop: None,
        stop_requested=lambda: False,
        progress=lambda step, metrics: None,
    )
    loop.run()
    tracker.close()
    return load_run(folder).stages[0]


def test_a_hacked_reward_is_visible_and_an_honest_one_raises_no_alarm(tmp_path):
    hacked = train(tmp_path / "hacked", longer_is_better)
    assert {advice.name for advice in hacked.advice} >= HACKED
    page = write_report([tmp_path / "hacked"], tmp_path / "report.html").read_text()
    for advice in hacked.advice:
        assert advice.text in page
    assert page.count('"reward":') == 8 * NUM_STEPS  # what was paid for can be read

    honest = train(tmp_path / "honest", starts_right)
    assert not {advice.name for advice in honest.advice} & HACKED
    rewards = honest.curves["rl/reward_mean"].values
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > first + 0.1  # it did learn: 2.5 standard errors of 160 coins
