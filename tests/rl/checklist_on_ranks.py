"""Checklist items that need ranks; each runs inside the processes, alone and with a bug planted in both of them."""

import math
from types import SimpleNamespace

import torch
from patched import planted
from reward_functions import echo

from distllm import registry
from distllm.engines import base, collectives, fsdp
from distllm.engines.base import build_engine
from distllm.engines.options import HardwareOptions
from distllm.generation import rollouts as spreading
from distllm.rl import loop
from distllm.rl.options import RLOptions
from distllm.rl.rewards import pool
from distllm.rl.rewards.pool import PooledReward
from distllm.testing.gloo import patient
from distllm.testing.rl import make_rollout
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import tiny_decoder

WHOLE = "whole = {n: self._whole(p.detach()) for n, p in self.model.named_parameters()}"
BUFFERS = "buffers = dict(self.model.named_buffers())"
BUGS = {
    "forwards": [
        (loop, "if not any_true(learns)", "if not learns"),
        (base, "return batches + [([0], False)] * (most - len(batches))", "return batches"),
    ],
    "pairs": [
        (spreading, "parts[p % size][p // size * num_samples :]", "parts[p % size][p // size :]"),
        (pool, "scores[other::size] = found", "scores[other * len(found) : (other + 1) * len(found)] = found"),
    ],
    "synced": [
        (fsdp, WHOLE, WHOLE + "; whole |= {n: globals().setdefault('OLD', {}).setdefault(n, p.clone()) for n, p in whole.items() if 'embed' in n}"),
        (fsdp, BUFFERS, BUFFERS + "; buffers = {n: globals().setdefault('OLD', {}).setdefault(n, b.clone()) for n, b in buffers.items()}"),
    ],
}  # fmt: skip


def items(options):
    """Return item -> one word per run: what held, first without, then with each bug."""
    checks = {"forwards": forwards, "pairs": pairs, "synced": synced}
    found = {}
    for name, check in checks.items():
        found[name] = [agreed(check, options)]
        for bug in BUGS[name]:
            with planted(*bug):
                found[name].append(agreed(check, options))
    return found


def agreed(check, options):
    """Run `check` on every rank; True where all found what they must."""
    try:
        right = check(options)
    except (LookupError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return not collectives.any_true(not right)


def engine_of(model, options):
    cpu = HardwareOptions(device="cpu", threads=1)
    return build_engine("policy", model, options=options, hardware=cpu, precision="fp32")


def forwards(options):
    """Ranks have equally many forwards and backwards to make, though one's share is masked and shares are uneven."""
    engine = engine_of(tiny_decoder(), options)
    source = make_source("grpo", {"policy": engine}, [[1]], lambda p, r: 0.0, end_id=36, max_new_tokens=4, batch_size=8)  # fmt: skip
    shared = [
        make_rollout([1], [2, 3], advantages=[1.0, 1.0], reward=math.nan if i % 2 else 1.0)
        for i in range(8)
    ]
    work = source._work(0, shared)
    counts = [len(part.micro_batches) for part in work]
    passes = [len(engine.share(count, 2)) for count in (1, 3, 5, 8)]
    everyone = collectives.gather_json([counts, passes])
    return len(everyone) == 2 and everyone[0] == everyone[1] and counts == [1]


def pairs(options):
    """Each response stands under the prompt it answers, with its own reward, on every rank."""
    prompts = [[3 * i + 1, 5, 9 + i] for i in range(5)]
    context = SimpleNamespace(
        options=RLOptions(reward_workers=1, reward_timeout_s=patient(60)), log=None, function=""
    )
    reward = PooledReward("reward_functions:echo", context)
    source = make_source(
        "grpo", {"policy": engine_of(tiny_decoder(), options)}, prompts, reward, end_id=36, max_new_tokens=6,
        batch_size=10, num_samples=2,
    )  # fmt: skip
    try:
        source._sample(0)
        source._reward(0)
    finally:
        reward.close()
    found = source.rollouts
    right = [r.prompt_index for r in found[::2]] == [r.prompt_index for r in found[1::2]]
    for rollout in found:
        right &= rollout.prompt_ids == prompts[rollout.prompt_index]
        text = source.sampling.decode(rollout.response_ids)
        right &= rollout.score == echo(str(rollout.prompt_ids), text)
    return right and len(found) == 10 and len({r.score for r in found}) > 5


def synced(options):
    """The sampler's copy has every weight, tied ones and buffers among them, after each update."""
    sharded = registry.get("engine", "fsdp").Options(name="fsdp", timeout_s=round(patient(60)))
    model = tiny_decoder(vocab_size=40, tie_embeddings=True)
    model.register_buffer("bias_of_the_run", torch.full((3,), 2.0))
    engine = engine_of(model, sharded)
    ids, right = torch.tensor([[3, 5, 7, 2]]), True
    for step in range(2):
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.mul_(1.5)
            engine.model.bias_of_the_run.add_(step + 1)
        trained = engine.infer(lambda m: m(ids).logits)
        with engine.sampling() as plain:
            sampled = plain(ids).logits
            copied = {n: b.tolist() for n, b in plain.named_buffers()}
        right &= torch.equal(trained, sampled)
        right &= copied["bias_of_the_run"] == engine.model.bias_of_the_run.tolist()
    return right
