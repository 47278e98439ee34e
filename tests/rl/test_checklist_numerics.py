"""Checklist, items 38 and 40 to 42: ranks and numerics. What several processes do is in `checklist_on_ranks.py`.

Item 39 is in `tests/engines/test_ranks.py`, where the collectives of a rollout are counted.
"""

import numpy as np
import pytest
import torch
from checklist import holds_and_notices
from checklist_on_ranks import BUGS

from distllm.config.fields import meaning
from distllm.generation import weights
from distllm.generation.weights import lowered
from distllm.optim import adamw
from distllm.optim.adamw import AdamW
from distllm.optim.options import AdamWOptions
from distllm.rl import objective
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.tiny import tiny_decoder


def held_and_noticed(on_two_ranks, name):
    """Assert that the check held on both ranks, and under no bug."""
    for rank in on_two_ranks:
        assert rank["items"][name] == [True] + [False] * len(BUGS[name])


def test_item_38_every_rank_makes_the_same_number_of_forwards_and_backwards(on_two_ranks):
    held_and_noticed(on_two_ranks, "forwards")
    model = tiny_decoder().double()
    masked = make_rollout([1, 2], [3, 4], advantages=[1.0, 1.0], reward=float("nan"))

    def check():
        """A share that is wholly masked still has a backward through every weight, whose gradient is 0."""
        made = make_algorithm("grpo", model).policy
        model.zero_grad()
        loss = made.loss(model, made.collate([masked])).losses["policy"]
        assert loss.requires_grad
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

    attached = "return (torch.where(tokens.learned, x, 0.0) * tokens.weights).sum()"
    cut = "return (x[tokens.learned] * tokens.weights[tokens.learned]).sum() if tokens.learned.any() else x.new_zeros(())"  # fmt: skip
    holds_and_notices(check, (objective, attached, cut))


def test_item_40_prompts_responses_and_rewards_stay_paired_across_ranks(on_two_ranks):
    held_and_noticed(on_two_ranks, "pairs")


def test_item_41_eps_is_added_outside_the_bias_correction():
    """PyTorch's form. TensorFlow's has eps sqrt(1 - beta2^t) in its place, so early updates are several times smaller."""
    options = AdamWOptions(beta2=0.999, eps=1e-2, weight_decay=0.0)
    gradients = torch.tensor([[0.01, -0.02], [0.03, 0.001]], dtype=torch.float64)

    def steps(outside):
        """The first three updates in numpy, from the definition."""
        m = v = 0.0
        weight, g = np.zeros((2, 2)), gradients.numpy()
        for t in (1, 2, 3):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            correction = np.sqrt(1 - 0.999**t)
            eps = options.eps if outside else options.eps / correction
            weight = weight - 0.1 * m / (1 - 0.9**t) / (np.sqrt(v) / correction + eps)
        return weight

    def check():
        layer = torch.nn.Linear(2, 2, bias=False).double()
        torch.nn.init.zeros_(layer.weight)
        optimizer = AdamW.build(layer, options)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for _ in range(3):
            layer.weight.grad = gradients.clone()
            optimizer.step()
        found = layer.weight.detach().numpy()
        np.testing.assert_allclose(found, steps(outside=True), rtol=1e-9)
        assert np.abs(found).sum() > 4 * np.abs(steps(outside=False)).sum(), "the forms differ"

    assert "outside the bias correction" in meaning(AdamWOptions, "eps")
    holds_and_notices(
        check,
        (adamw, "eps=options.eps", "eps=options.eps / (1 - options.beta2) ** 0.5"),
    )


def test_item_42_the_sampler_has_tied_weights_and_buffers_after_every_update(on_two_ranks):
    held_and_noticed(on_two_ranks, "synced")
    model = tiny_decoder(tie_embeddings=True).eval()
    ids = torch.tensor([[3, 5, 7, 2]])

    def check():
        """In lower precision too: the copy that samples is one weight in both of its places."""
        for _ in range(2):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model.embed.weight.mul_(1.5)
                exact = model(ids).logits
                with lowered(model, torch.bfloat16):
                    assert model.head.projection.data_ptr() == model.embed.weight.data_ptr()
                    assert torch.equal(model(ids).logits, exact)

    kept = (
        "globals().setdefault('OLD', {}).setdefault(parameter.shape, parameter.detach().to(dtype))"
    )
    holds_and_notices(check, (weights, "parameter.detach().to(dtype)", kept))


def test_a_bug_is_no_error_that_anything_would_stop_at(on_two_ranks):
    """Each bug of these items runs to the end, quietly: only the check tells."""
    assert all(type(x) is bool for found in on_two_ranks[0]["items"].values() for x in found)
    with pytest.raises(AssertionError):
        held_and_noticed([{"items": {"pairs": [True, True, False]}}], "pairs")
