"""Recorded rollouts, and the gradient they give under any layout, for every algorithm and the value model."""

import torch

from distllm import registry
from distllm.rl.algorithms.ppo import PPOOptions, ValueObjective
from distllm.testing.rl import make_algorithm
from distllm.testing.tiny import PAD_ID, single_engine, tiny_decoder
from distllm.types import Rollout, sum_by_key

NAMES = [*registry.names("algorithm"), "value"]


def recorded(count=8, seed=0):
    """Ragged responses whose policy has moved since; one could not be scored, some tokens are an environment's."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        length = int(torch.randint(1, 9, (1,), generator=generator))

        def draw(length=length):
            return torch.randn(length, generator=generator, dtype=torch.float64)

        mask = torch.ones(length, dtype=torch.bool)
        mask[1:3] = index % 3 != 1 or length < 4
        found.append(
            Rollout(
                prompt_ids=torch.randint(1, 37, (3 + index % 4,), generator=generator).tolist(),
                response_ids=torch.randint(1, 37, (length,), generator=generator).tolist(),
                rollout_logprobs=draw() * 0.1 - 3.6,
                finish_reason="stop",
                prompt_index=index,
                loss_mask=mask,
                reward=float("nan") if index == 5 else 1.0,
                old_logprobs=draw() * 0.1 - 3.6,
                ref_logprobs=draw() * 0.1 - 3.6,
                old_values=draw(),
                advantages=draw(),
                returns=draw(),
            )
        )
    return found


def case(name, pack=False, off_policy="sequence_truncate"):
    """Return (model, objective) in fp64, every term of the loss switched on."""
    if name == "value":
        model = tiny_decoder("value").double()
        with torch.no_grad():
            model.head.weight.normal_(generator=torch.Generator().manual_seed(3))
        return model, ValueObjective(PPOOptions(pack=pack), model.join, PAD_ID)
    model = tiny_decoder().double()
    algorithm = make_algorithm(
        name,
        model,
        temperature=0.7,
        kl_coef=0.1,
        kl_in="loss",
        kl_kind="k3",
        entropy_coef=0.01,
        off_policy=off_policy,
        pack=pack,
    )
    return model, algorithm.policy


def gradients(model, objective, examples, split, change=lambda batch: batch, totals=None):
    """Run the engine's forward and backward over the micro-batches of `split`; return (gradients, losses)."""
    engine = single_engine(model)
    batches, start = [], 0
    for size in split:
        batches.append(change(objective.collate(examples[start : start + size])))
        start += size
    totals = totals or sum_by_key(objective.weights(b) for b in batches)
    out = engine.forward_backward(objective, batches, totals)
    losses = {k: (v / totals[k]).item() for k, v in out.losses.items()}
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, losses


def padded_left(batch):
    """Move every row to the right end of the rectangle."""
    shifts = [int((~row).sum()) for row in batch.attention_mask]
    for name in (
        "input_ids", "labels", "attention_mask", "response_index", "loss_mask", "rollout_logprobs",
        "old_logprobs", "ref_logprobs", "old_values", "advantages", "returns",
    ):  # fmt: skip
        field = getattr(batch, name)
        rows = [row.roll(shift) for row, shift in zip(field, shifts, strict=True)]
        setattr(batch, name, torch.stack(rows))
    return batch


def largest_difference(expected, found):
    """Compare two sets of gradients, relative to the largest entry of the expected."""
    assert expected.keys() == found.keys()
    scale = max(g.abs().max() for g in expected.values())
    return max((found[n] - g).abs().max() / scale for n, g in expected.items()).item()
