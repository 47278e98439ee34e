"""What the RL tests run on each of several processes; `distllm.testing.gloo` starts them."""

import math
from types import SimpleNamespace

import checklist_on_ranks
import torch
from recorded import NAMES, case, gradients, largest_difference, recorded

from distllm import registry
from distllm.engines import collectives
from distllm.engines.base import build_engine
from distllm.engines.options import HardwareOptions
from distllm.engines.processes import processes
from distllm.optim.options import AdamWOptions
from distllm.rl.options import RLOptions
from distllm.rl.rewards.pool import PooledReward
from distllm.testing.gloo import patient
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.train.step import optimizer_step
from distllm.types import sum_by_key

END = 36


def engine_of(model, options=None, role="model"):
    if options is None:
        return single_engine(model, role)
    return build_engine(
        role,
        model,
        options=options,
        hardware=HardwareOptions(device="cpu", threads=1),
        precision="fp32",
        optim=AdamWOptions(),
    )


def everything():
    """Run all of it under one start of the processes."""
    options = registry.get("engine", "ddp").Options(name="ddp", timeout_s=round(patient(60)))
    with processes(options, torch.device("cpu")):
        return {
            **gradients_on_ranks(options),
            "loops": {name: loop(name, options) for name in ("grpo", "ppo", "remax", "dapo")},
            "functions": functions(),
            "masked": masked_rank(options),
            "items": checklist_on_ranks.items(options),
        }


def gradients_on_ranks(options):
    """Compare the reduced gradient of every objective with that of a single process."""
    found, own_totals = {}, 0.0
    for name in NAMES:
        model, objective = case(name)
        expected, _ = gradients(model, objective, recorded(), [8])
        expected = {n: g.clone() for n, g in expected.items()}
        model, objective = case(name)
        engine = engine_of(model, options)
        mine = {0: recorded()[:5], 1: recorded()[5:]}[engine.ranks.dp_rank]
        batches = [objective.collate(part) for part in (mine[:2], mine[2:])]
        own = sum_by_key(objective.weights(b) for b in batches)
        engine.forward_backward(objective, batches, {k: v * 2 for k, v in own.items()})
        wrong = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
        own_totals = max(own_totals, largest_difference(expected, wrong))
        engine.discard()
        engine.forward_backward(objective, batches, engine.all_sum(own))
        right = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
        found[name] = largest_difference(expected, right)
    return {"gradients": found, "own totals": own_totals}


def judge(prompt, response):
    """A reward that tells responses and prompts apart; one in seven cannot be scored."""
    total = sum(response) + 3 * prompt[0]
    return math.nan if total % 7 == 0 else total % 5 / 4


def loop(name, options=None):
    """Two steps of the whole loop: what was sampled, its rewards and advantages, the weights at the end."""
    torch.manual_seed(0)
    engines = {
        "policy": engine_of(tiny_decoder(), options, "policy"),
        "reference": single_engine(tiny_decoder(seed=4), trained=False),
    }
    if name == "ppo":
        engines["value"] = engine_of(tiny_decoder("value", seed=1), options, "value")
    made = {"num_samples": 4} if name in ("grpo", "dapo") else {"num_samples": 2}
    source = make_source(
        name,
        engines,
        [[1 + i, 5, 9 + i % 3] for i in range(6)],
        judge,
        end_id=END,
        max_new_tokens=5,
        batch_size=8,
        rollout_batch_size=16,
        kl_coef=0.1,
        **made,
    )
    seen, batches = [], []
    for step in range(2):
        work, metrics = source.next(step)
        if step == 0:
            kept = source.rollouts
            seen = [
                [r.prompt_index, r.response_ids, r.score if math.isfinite(r.score) else None, r.advantages.tolist()]
                for r in kept
            ]  # fmt: skip
            known = {k: v for k, v in metrics.items() if not k.startswith("time/")}
        for part in work:
            batches.append(
                [len(part.micro_batches), sum(len(b.input_ids) for b in part.micro_batches)]
            )
            optimizer_step(part.engine, part.objective, part.micro_batches, 1e-2)
    weights = torch.cat([p.detach().flatten() for p in engines["policy"].model.parameters()])
    return {
        "seen": seen,
        "metrics": known,
        "batches": batches,
        "weights": [weights.sum().item(), weights.square().sum().item(), weights[::997].tolist()],
    }


def functions():
    """Each rank runs its share of a reward function's calls; all get all rewards, in order."""
    context = SimpleNamespace(
        options=RLOptions(reward_workers=1, reward_timeout_s=patient(60)), log=None, function=""
    )
    reward = PooledReward("reward_functions:length", context)
    from distllm.types import Prompt

    prompt = Prompt(messages=[{"role": "user", "content": "?"}])
    texts = ["x" * (i * 5 % 7) for i in range(9)]
    try:
        scores = reward.score([prompt] * 9, [], texts)
        return {"scores": scores, "rank": collectives.rank()}
    finally:
        reward.close()


def masked_rank(options):
    """All responses of rank 1 are left out: it still takes part, and the step is that of the rest."""
    model, objective = case("grpo")
    good = [r for r in recorded() if math.isfinite(r.reward)][:4]
    expected, _ = gradients(model, objective, good, [4])
    expected = {n: g.clone() for n, g in expected.items()}
    model, objective = case("grpo")
    engine = engine_of(model, options)
    mine = good if engine.ranks.dp_rank == 0 else recorded(seed=9)[:4]
    if engine.ranks.dp_rank:
        for rollout in mine:
            rollout.reward = math.nan
    batches = [objective.collate(mine)]
    own = sum_by_key(objective.weights(b) for b in batches)
    engine.forward_backward(objective, batches, engine.all_sum(own))
    return {
        "difference": largest_difference(
            expected, {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
        ),
        "own weight": own["policy"].item(),
    }
