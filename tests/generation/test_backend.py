"""The check that every back end of sampling must pass, on the built-in one and on back ends that are wrong in known ways."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distllm.errors import EngineError
from distllm.generation.backend import Alone, check_parity
from distllm.generation.options import GenerationOptions
from distllm.rl.scoring import score_logprobs
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.train.step import optimizer_step

PROMPTS = [SimpleNamespace(prompt_ids=ids) for ids in ([5, 6, 7, 8], [3], [9, 30])]


def check(sampler, model, temperature=0.8):
    def score(rollouts):
        engine = single_engine(model, trained=False)
        return score_logprobs(engine, rollouts, model.join, 0, temperature, 4)

    options = GenerationOptions(max_new_tokens=12, temperature=temperature)
    return check_parity(sampler, model, PROMPTS, options, score, end_ids=[36], pad_id=0)


class Cold(Alone):
    """Samples at another temperature than the run's."""

    def __call__(self, model, prompts, options, **settings):
        return super().__call__(model, prompts, replace(options, temperature=0.9), **settings)


class TopK(Alone):
    """Draws among the likeliest tokens only."""

    def __call__(self, model, prompts, options, **settings):
        return super().__call__(model, prompts, replace(options, top_k=10), **settings)


class Stale(Alone):
    """Copies the weights once and never again."""

    copied = None

    def sync(self, model):
        self.copied = self.copied or copy.deepcopy(model)

    def __call__(self, model, prompts, options, **settings):
        return super().__call__(self.copied, prompts, options, **settings)


class Shuffled(Alone):
    """Loses track of which response belongs to which prompt."""

    def __call__(self, model, prompts, options, **settings):
        return super().__call__(model, prompts, options, **settings)[::-1]


def test_the_built_in_one_passes():
    assert check(Alone(), tiny_decoder().double()) < 1e-9
    assert check(Alone(), tiny_decoder()) < 1e-5
    assert check(Alone(), tiny_decoder().bfloat16()) < 0.05


@pytest.mark.parametrize("wrong", [Cold, TopK])
def test_another_distribution_is_refused(wrong):
    with pytest.raises(EngineError, match=wrong.__name__):
        check(wrong(), tiny_decoder())


def test_stale_weights_are_refused_and_fresh_ones_are_not():
    model, stale = tiny_decoder(), Stale()
    assert check(stale, model) < 1e-5
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.2)
    with pytest.raises(EngineError, match="Stale"):
        check(stale, model)


def test_a_wrong_order_is_refused():
    with pytest.raises(EngineError, match="not prompt by prompt"):
        check(Shuffled(), tiny_decoder())


def test_the_loop_syncs_before_it_samples_and_sleeps_before_it_learns():
    calls = []

    class Recorded(Alone):
        def sync(self, model):
            calls.append("sync")

        def __call__(self, *args, **settings):
            calls.append("sample")
            return super().__call__(*args, **settings)

        def sleep(self):
            calls.append("sleep")

    engine = single_engine(tiny_decoder(), "policy")
    source = make_source(
        "grpo", {"policy": engine}, [[1], [2]], lambda p, r: float(sum(r) % 3), end_id=36, max_new_tokens=6,
        batch_size=8, num_samples=4, sample=Recorded(),
    )  # fmt: skip
    for step in range(2):
        work, _ = source.next(step) or ([], {})
        for part in work:
            calls.append("learn")
            optimizer_step(part.engine, part.objective, part.micro_batches, part.lr)
    assert calls == ["sync", "sample", "sleep", "learn"] * 2
