"""Responses without a gradient are left out of the forward, and the step stays what it was."""

import dataclasses

import pytest
import torch

from distllm.rl.layout import collate_rollouts
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.tiny import PAD_ID, tiny_decoder


def responses():
    """Return two groups of three: one with a spread of advantages, one without."""
    group = ([3, 4, 5], [6], [7, 8]), (1.0, -2.0, 0.5), (-0.7, -1.1, -0.4)
    spread = [
        make_rollout([1, 2], ids, advantages=[a] * len(ids), old_logprobs=[old] * len(ids))
        for ids, a, old in zip(*group, strict=True)
    ]
    flat = [dataclasses.replace(r, advantages=torch.zeros_like(r.advantages)) for r in spread]
    return [*flat[:2], *spread, *flat[2:]]


def step(objective, model, batch):
    """Return the gradient of the normalised loss, flattened, and the weight."""
    weight = objective.weights(batch)["policy"]
    model.zero_grad()
    (objective.loss(model, batch).losses["policy"] / weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), weight.item()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_gradient_is_that_of_all_responses(aggregation):
    model = tiny_decoder().double()
    objective = make_algorithm("grpo", model, aggregation=aggregation).policy
    kept = objective.collate(responses())
    whole = collate_rollouts(responses(), model.join, PAD_ID)
    assert (len(kept.input_ids), len(whole.input_ids)) == (3, 6)
    fast, slow = (step(objective, model, batch) for batch in (kept, whole))
    assert fast[1] == slow[1]
    assert slow[0].norm() > 0
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-10, atol=1e-14)

    shares = [objective.loss(model, b).metrics["rl/learned_share"] for b in (kept, whole)]
    assert [(a / b).item() for a, b in shares] == [0.5, 1.0]

    kept.total = None  # the bug: the mean over what is left
    assert not torch.allclose(step(objective, model, kept)[0], slow[0], rtol=1e-3)


@pytest.mark.parametrize("term", ["kl_coef", "entropy_coef"])
def test_a_term_that_pushes_every_response_keeps_them_all(term):
    model = tiny_decoder()
    objective = make_algorithm("grpo", model, **{term: 0.1}).policy
    assert len(objective.collate(responses()).input_ids) == 6


def test_one_response_stays_when_none_has_a_gradient():
    model = tiny_decoder().double()
    objective = make_algorithm("grpo", model).policy
    flat = [r for r in responses() if not r.advantages.any()]
    batch = objective.collate(flat)
    gradient, weight = step(objective, model, batch)
    assert len(batch.input_ids) == 1
    assert weight == 6
    assert not gradient.any()
