"""What the tests of DeepSpeed run on each rank; without a launcher the same runs on one process."""

import contextlib
import math
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from distllm import registry
from distllm.engines import processes
from distllm.engines.base import build_engine
from distllm.engines.deepspeed import DeepSpeed
from distllm.engines.options import BatchSizes, HardwareOptions
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.optim.options import AdamWOptions
from distllm.testing.gloo import patient
from distllm.testing.tiny import PAD_ID, tiny_decoder
from distllm.train.step import optimizer_step

CPU = HardwareOptions(device="cpu", threads=1)
NAMES = ["sft", "reward", "value", "policy-token"]
STEPS = 3


def options_of(engine, **changes):
    return registry.get("engine", engine).Options(
        name=engine, timeout_s=round(patient(60)), **changes
    )


def build(options, model, trained=True, precision="fp32", role="model"):
    return build_engine(
        role,
        model,
        options=options,
        hardware=CPU,
        precision=precision,
        optim=AdamWOptions(lr=1e-3) if trained else None,
        batch=BatchSizes(8, 2),
    )


class Run:
    """A model under an engine, and its uneven share of eight examples: five on rank 0, three on rank 1."""

    def __init__(self, options, name, precision="fp32"):
        from test_step import case  # the folder of that file is in the path on the ranks alone

        model, self.objective, examples = case(name)
        self.engine = build(options, model.float(), precision=precision)
        if self.engine.ranks.dp_size == 2:
            examples = examples[:5] if self.engine.ranks.dp_rank == 0 else examples[5:]
        self.batches = [self.objective.collate(part) for part in (examples[:2], examples[2:])]

    def steps(self, count=STEPS):
        found = [
            optimizer_step(self.engine, self.objective, self.batches, 1e-3) for _ in range(count)
        ]
        return {
            "losses": [r.loss for r in found],
            "norms": [r.grad_norm for r in found],
            "skipped": [r.skipped for r in found],
        }

    def weights(self):
        """Return the whole weights as lists, on rank 0."""
        return {n: w.tolist() for n, w in self.engine.export().items()}

    def state(self):
        return {k: v.clone() for k, v in self.engine.state()}


def learning(options):
    """Train a model with each objective."""
    found = {}
    for name in NAMES:
        run = Run(options, name)
        found[name] = run.steps() | {"weights": run.weights()}
        run.engine.close()
    return found


def resuming(options):
    """Save, go on; load into a new engine, and go on there."""
    run = Run(options, "sft")
    at_first = list(run.state())
    run.steps(2)
    saved = run.state()
    undisturbed = run.steps(2)
    other = Run(options, "sft")
    other.engine.load_state(saved)
    found = {
        "at_first": at_first,
        "names": list(saved),
        "shapes": {k: list(v.shape) for k, v in saved.items()},
        "steps": sorted({v.item() for k, v in saved.items() if k.startswith("step/")}),
        "kept": all(torch.equal(v, saved[k]) for k, v in other.state().items()),
        "undisturbed": undisturbed,
        "resumed": other.steps(2),
        "state": {k: v.tolist() for k, v in saved.items()},
    }
    run.engine.close()
    other.engine.close()
    return found


def skipping(options):
    """Steps that are not finite, on one rank, in the loss or only in a gradient, leave everything as it was."""
    run = Run(options, "sft")
    honest = run.objective.loss
    run.steps(1)
    before = run.state()

    def poisoned(in_gradient):
        def loss(model, batch):
            out = honest(model, batch)
            if run.engine.ranks.rank == run.engine.ranks.world_size - 1:
                if in_gradient:
                    out.losses["lm"].register_hook(lambda g: g * math.nan)
                else:
                    out.losses["lm"] = out.losses["lm"] * math.inf
            return out

        return loss

    found = []
    for in_gradient in (True, False):
        run.objective.loss = poisoned(in_gradient)
        found += run.steps(1)["skipped"]
        after = run.state()
        found.append(all(torch.equal(before[k], after[k]) for k in before))
    run.objective.loss = honest
    found.append(run.steps(2))
    run.engine.close()
    return found


@contextlib.contextmanager
def counted():
    """Count the collectives, whoever starts them."""
    calls = []
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield calls
    names = [event.name for event in recorded.events()]
    calls += [n for n in names if n.startswith("c10d::")]


def sampling(options):
    """Greedy responses, ranks having different amounts to do; the engine learns before and after."""
    run = Run(options, "policy-token")
    run.steps(1)
    counts = []
    for max_new_tokens in (3, 12):
        with counted() as calls, run.engine.sampling() as model:
            mine = list(range(3)) if run.engine.ranks.rank == 0 else [0]
            rollouts = generate(
                model,
                [[3 + i, 7, 11 + i] for i in mine],
                GenerationOptions(max_new_tokens=max_new_tokens, temperature=0.0),
                end_ids=[1],
                pad_id=PAD_ID,
            )
        counts.append(len(calls))
    learned = run.steps(1)
    run.engine.close()
    return {"rollouts": [r.response_ids for r in rollouts], "counts": counts, "learned": learned}


def quartet(options):
    """Four engines in one process, two of them learning."""
    policy, value = Run(options, "policy-token"), Run(options, "value")
    reference = build(options, tiny_decoder("lm", seed=3), trained=False, role="reference")
    reward = build(options, tiny_decoder("last", seed=4), trained=False, role="reward")
    ids = torch.arange(2, 14).reshape(2, 6)

    def logits(model):
        return model(ids).logits

    def scores(model):
        return model(ids, torch.ones_like(ids)).scores

    found = {"reference": [], "reward": [], "policy": [], "value": []}
    for _ in range(2):
        found["reference"].append(reference.infer(logits).tolist())
        found["reward"].append(reward.infer(scores).tolist())
        found["policy"].append(policy.steps(1))
        found["value"].append(value.steps(1))
        found["reference"].append(policy.engine.infer(logits).tolist())
    found["sizes"] = [e.num_parameters for e in (policy.engine, reference, reward)]
    for engine in (policy.engine, value.engine, reference, reward):
        engine.close()
    return found


def lowered(options):
    """Learn in bf16."""
    run = Run(options, "sft", precision="bf16")
    found = run.steps(6)["losses"]
    weights = {str(v.dtype) for k, v in run.engine.state() if k.startswith(("weight/", "exp_avg/"))}
    run.engine.close()
    return {"losses": found, "master": sorted(weights)}


CHECKS = ("learning", "resuming", "skipping", "sampling", "quartet", "lowered")


def controls(options):
    """Bugs put in on purpose: what `learning` and `skipping` find then."""
    found = {}

    def built_on_the_parts(engine):
        return registry.get("optim", engine.optim.name).build(engine.model, engine.optim)

    bugs = {
        "mean over ranks": (DeepSpeed, "averages", False),
        "decay by the shapes of parts": (DeepSpeed, "_torch_optimizer", built_on_the_parts),
    }
    for name, (cls, attribute, bug) in bugs.items():
        with mock.patch.object(cls, attribute, bug):
            run = Run(options, "sft")
            found[name] = run.steps() | {"weights": run.weights()}
            run.engine.close()
    run = Run(options, "sft")
    run.engine.forward_backward(run.objective, run.batches, run.objective.weights(run.batches[0]))
    with mock.patch.object(DeepSpeed, "discard", lambda engine: None):
        run.engine.discard()
    found["a gradient left behind"] = run.steps()
    run.engine.close()
    return found


def run(engine, variants):
    """Join the group once; do the named checks, or all, under one set of options after the other."""
    found = []
    with processes.processes(options_of(engine), torch.device("cpu")):
        for changes, checks in variants:
            options = options_of(engine, **changes)
            found.append({n: globals()[n](options) for n in checks or CHECKS})
    return found
