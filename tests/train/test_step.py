"""The law of the step: the gradient does not depend on how sequences are split into micro-batches."""

import math
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from distllm.errors import DataError
from distllm.objectives.reward import Reward, RewardOptions
from distllm.objectives.sft import SFT, SFTOptions
from distllm.rl.algorithms.ppo import PPOOptions, ValueObjective
from distllm.testing.rl import make_algorithm
from distllm.testing.tiny import PAD_ID, chat_examples, pair_examples, single_engine, tiny_decoder
from distllm.train.step import optimizer_step
from distllm.types import IGNORE_INDEX, Rollout, sum_by_key

SPLITS = ([8], [4, 4], [2, 2, 2, 2], [1] * 8, [5, 2, 1])


def rollouts(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        length = int(torch.randint(1, 9, (1,), generator=generator))

        def draw(length=length):
            return torch.randn(length, generator=generator, dtype=torch.float64)

        found.append(
            Rollout(
                prompt_ids=torch.randint(1, 37, (3 + index % 4,), generator=generator).tolist(),
                response_ids=torch.randint(1, 37, (length,), generator=generator).tolist(),
                rollout_logprobs=draw() - 3,
                finish_reason="stop",
                prompt_index=index,
                reward=1.0,
                old_logprobs=draw() * 0.1 - 3.6,
                ref_logprobs=draw() * 0.1 - 3.6,
                old_values=draw(),
                advantages=draw(),
                returns=draw(),
            )
        )
    return found


def case(name):
    """Return (model, objective, eight examples) in fp64."""
    head = {"reward": "last", "value": "value"}.get(name, "lm")
    model = tiny_decoder(head).double()
    if name == "sft":
        return model, SFT(SFTOptions(), pad_id=PAD_ID), chat_examples(8)
    if name == "reward":
        return model, Reward(RewardOptions(), PAD_ID, model.join), pair_examples(8)
    if name == "value":
        return model, ValueObjective(PPOOptions(), model.join, PAD_ID), rollouts()
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "aggregation": name.split("-")[1]}
    algorithm = make_algorithm("grpo", model, temperature=0.7, **options)
    return model, algorithm.policy, rollouts()


def gradients(model, objective, examples, split):
    """Run the engine's forward and backward over `split`; return gradients by name."""
    engine = single_engine(model)
    batches, start = [], 0
    for size in split:
        batches.append(objective.collate(examples[start : start + size]))
        start += size
    totals = sum_by_key(objective.weights(b) for b in batches)
    engine.forward_backward(objective, batches, totals)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    engine.discard()
    return grads


def largest_difference(a, b):
    scale = max(g.abs().max() for g in a.values())
    return max((a[n] - b[n]).abs().max() / scale for n in a).item()


NAMES = ["sft", "reward", "value", "policy-token", "policy-sequence"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_gradients_do_not_depend_on_the_split(name, split):
    model, objective, examples = case(name)
    whole = gradients(model, objective, examples, SPLITS[0])
    assert largest_difference(whole, gradients(model, objective, examples, split)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_mean_of_means_would_be_noticed(name):
    """The bug patched in: each micro-batch divided by its own weight."""
    model, objective, examples = case(name)
    whole = gradients(model, objective, examples, [8])
    honest = objective.weights
    batches = [objective.collate(examples[:5]), objective.collate(examples[5:])]
    engine = single_engine(model)
    for batch in batches:
        local = {k: v * len(batches) for k, v in honest(batch).items()}
        engine.forward_backward(objective, [batch], local)
    wrong = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert largest_difference(whole, wrong) > 1e-4


def test_sft_gradient_equals_cross_entropy_over_all_assistant_tokens():
    """Against plain torch on each dialogue alone, without padding."""
    model, objective, examples = case("sft")
    ours = gradients(model, objective, examples, [3, 3, 2])
    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    for e in examples:
        logits = model(torch.tensor([e.input_ids[:-1]])).logits[0]
        labels = torch.tensor(
            [t if m else IGNORE_INDEX for t, m in zip(e.input_ids[1:], e.mask[1:], strict=True)]
        )
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        count += sum(e.mask[1:])
    model.zero_grad()
    (total / count).backward()
    plain = {n: p.grad for n, p in model.named_parameters()}
    assert largest_difference(plain, ours) < 1e-10


def test_the_loss_reported_is_the_global_mean():
    model, objective, examples = case("sft")
    engine = single_engine(model)
    batches = [objective.collate(examples[:3]), objective.collate(examples[3:])]
    expected = sum(objective.loss(model, b).losses["lm"].item() for b in batches) / sum(
        objective.weights(b)["lm"].item() for b in batches
    )
    result = optimizer_step(engine, objective, batches, lr=1e-3)
    assert math.isclose(result.loss, expected, rel_tol=1e-12)
    assert result.grad_norm > 0 and not result.skipped


def test_a_step_without_targets_is_an_error_that_names_the_samples():
    model, objective, examples = case("sft")
    for e in examples:
        e.mask = [False] * len(e.mask)
    with pytest.raises(DataError, match=r"no target for `lm`: samples \[0, 1, 2"):
        optimizer_step(single_engine(model), objective, [objective.collate(examples)], lr=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_never_reaches_the_weights(poison):
    model, objective, examples = case("sft")
    engine = single_engine(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = objective.loss

    def poisoned(model, batch):
        out = loss(model, batch)
        out.losses["lm"] = out.losses["lm"] * poison
        return out

    with mock.patch.object(objective, "loss", poisoned):
        result = optimizer_step(engine, objective, [objective.collate(examples)], lr=1e-3)
    assert result.skipped
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer_step(engine, objective, [objective.collate(examples)], lr=1e-3).skipped


def test_a_non_finite_gradient_never_reaches_the_weights():
    model, objective, examples = case("sft")
    engine = single_engine(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    hook = model.embed.weight.register_hook(lambda g: g * float("nan"))
    result = optimizer_step(engine, objective, [objective.collate(examples)], lr=1e-3)
    hook.remove()
    assert result.skipped and math.isfinite(result.loss)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
