"""What the ranks of `test_rollouts_sharded.py` run: PPO's whole quartet under one engine, one batch of rollouts."""

import torch
from on_zero import CPU, counted, options_of

from distllm.engines import processes
from distllm.engines.base import build_engine
from distllm.optim.options import AdamWOptions
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import tiny_decoder

END = 36
PROMPTS = [[1 + i, 5, 9 + i % 3] for i in range(5)]
"""An odd number: one rank has three of them, the other two."""


def judge(prompt, response):
    """A reward that tells prompts and responses apart: what is paired wrongly is scored otherwise."""
    return (sum(response) + 31 * prompt[0]) % 17 / 16


def build(options, model, trained=False, role="model"):
    return build_engine(
        role,
        model,
        options=options,
        hardware=CPU,
        precision="fp32",
        optim=AdamWOptions(lr=1e-3) if trained else None,
    )


def rollouts(options, max_new_tokens):
    """Sample, score and prepare once; return every response with its rewards, and the collectives of this rank."""
    engines = {
        "policy": build(options, tiny_decoder(), True, "policy"),
        "value": build(options, tiny_decoder("value", seed=1), True, "value"),
        "reference": build(options, tiny_decoder(seed=4), role="reference"),
    }
    source = make_source(
        "ppo",
        engines,
        PROMPTS,
        judge,
        end_id=END,
        max_new_tokens=max_new_tokens,
        batch_size=5,
        rollout_batch_size=10,
        num_samples=2,
        kl_coef=0.1,
    )
    with counted() as calls:
        source.next(0)
    kept = [
        [r.prompt_index, r.prompt_ids, r.response_ids, r.score, r.advantages.tolist()]
        for r in source.rollouts
    ]
    for engine in engines.values():
        engine.close()
    return {"kept": kept, "calls": len(calls)}


def run(engine, **changes):
    options = options_of(engine, **changes)
    with processes.processes(options, torch.device("cpu")):
        return [rollouts(options, tokens) for tokens in (4, 24)]
