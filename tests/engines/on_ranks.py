"""What the tests of several processes run on each rank; `distllm.testing.gloo` starts them."""

import functools

import test_step
import torch
from patched import planted
from test_step import NAMES, case, gradients, largest_difference
from torch.utils._python_dispatch import TorchDispatchMode

from distllm import registry
from distllm.engines import collectives, fsdp, processes
from distllm.engines.base import build_engine
from distllm.engines.mesh import MeshOptions
from distllm.engines.options import HardwareOptions
from distllm.errors import DataError, OtherRankError
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.optim.options import AdamWOptions
from distllm.testing.gloo import patient
from distllm.testing.tiny import PAD_ID, single_engine, tiny_decoder
from distllm.types import sum_by_key

CPU = HardwareOptions(device="cpu", threads=1)


def options_of(engine, **changes):
    return registry.get("engine", engine).Options(
        name=engine, timeout_s=round(patient(60)), **changes
    )


@functools.cache
def reference(name):
    model, objective, examples = case(name)
    return gradients(model, objective, examples, [8])


def law_of_the_step(options, names=NAMES):
    """Compare gradients with a single process's, in fp64, the ranks holding uneven parts; and with a mean of means."""
    found = {}
    for name in names:
        model, objective, examples = case(name)
        expected = reference(name)
        norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
        model, objective, _ = case(name)
        engine = build_engine(
            "model", model, options=options, hardware=CPU, precision="fp32", optim=AdamWOptions()
        )
        mine = {1: {0: examples}, 2: {0: examples[:5], 1: examples[5:]}}[engine.ranks.dp_size]
        mine = mine[engine.ranks.dp_rank]
        batches = [objective.collate(part) for part in (mine[:2], mine[2:])]
        own = sum_by_key(objective.weights(b) for b in batches)
        wrong = {k: v * engine.ranks.dp_size for k, v in own.items()}
        for label, weights in (("own weights", wrong), ("right", engine.all_sum(own))):
            engine.discard()
            engine.forward_backward(objective, batches, weights)
            grads = {n: engine._full(p.grad) for n, p in engine.model.named_parameters()}
            found[f"{name} {label}"] = largest_difference(expected, grads)
        clipped = engine._grad_norm(norm / 2).item()
        found[f"{name} norm"] = abs(clipped / norm - 1)
        half = engine._grad_norm(norm).item()
        found[f"{name} clipped"] = abs(2 * half / norm - 1)
    return found


def messages():
    """Exercise everything in `collectives` where ranks differ."""
    rank = collectives.rank()
    parts = collectives.gather_tensors(
        {f"t{rank}": torch.arange(rank + 3), "n": torch.tensor(rank)}
    )
    many = {f"t{i}": torch.tensor(i) for i in (3, 1, 2, 5, 4, 0)}
    found = {
        "order": ["".join(part) for part in collectives.gather_tensors(many)],
        "tensors": [{k: v.tolist() for k, v in part.items()} for part in parts],
        "json": collectives.gather_json({"rank": rank, "text": "x" * (rank * 70)}),
        "any": [collectives.any_true(rank == 1), collectives.any_true(False)],
        "sum": {k: v.item() for k, v in collectives.sum_scalars({"a": torch.tensor(1.5)}).items()},
        "main": collectives.from_main(lambda: {"from": rank}),
    }

    def fail():
        if rank == 1:
            raise DataError("line 7 is broken")

    try:
        collectives.together(fail)
    except (DataError, OtherRankError) as error:
        found["error"] = [type(error).__name__, str(error)]
    return found


class Counter(TorchDispatchMode):
    """Counts the collectives that are called inside its `with`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.count += not function._opname.startswith("wait")
        return function(*args, **(kwargs or {}))


TALKATIVE = (
    "self._plain.eval()",
    "self._plain.eval(); self._plain.register_forward_pre_hook(lambda *_: dist.all_reduce(torch.zeros(1)))",
)
"""A bug: the model that samples tells the other ranks something in each forward."""


def sampling(options):
    """Count the collectives of a rollout of few and of many tokens; then let the ranks do unequally much."""
    model = tiny_decoder(vocab_size=40)
    expected = {n: p.clone() for n, p in model.named_parameters()}
    engine = build_engine("policy", model, options=options, hardware=CPU, precision="fp32")
    rank = collectives.rank()

    def roll(num_tokens, num_prompts):
        prompts = [[3 + i, 5, 7] for i in range(num_prompts)]
        greedy = GenerationOptions(max_new_tokens=num_tokens, temperature=0.0)
        with Counter() as counter, engine.sampling() as plain:
            weights = dict(plain.named_parameters())
            same = all(torch.equal(weights[n], expected[n]) for n in expected)
            found = generate(plain, prompts, greedy, end_ids=[], pad_id=PAD_ID)
        return [r.response_ids for r in found], counter.count, same

    few, many = roll(2, 3), roll(20, 3)
    with planted(fsdp, *TALKATIVE):
        chatty = [roll(n, 3)[1] for n in (2, 20)]
    engine._plain._forward_pre_hooks.clear()
    roll(20 if rank else 2, 1 + rank)  # a rank that ends early must not leave the others waiting
    alone = single_engine(tiny_decoder(vocab_size=40), trained=False)
    with alone.sampling() as plain:
        reference = generate(
            plain, [[3 + i, 5, 7] for i in range(3)],
            GenerationOptions(max_new_tokens=20, temperature=0.0), end_ids=[], pad_id=PAD_ID,
        )  # fmt: skip
    with Counter() as counter:  # the same forwards through the sharded model itself
        for _ in range(5):
            engine.infer(lambda m: m(torch.tensor([[3, 5, 7]]), compute_logits=False))
    return {
        "counts": [few[1], many[1], counter.count],
        "with a message per forward": chatty,
        "weights": few[2] and many[2],
        "greedy": many[0] == [r.response_ids for r in reference],
        "on meta again": all(p.is_meta for p in getattr(engine, "_plain", model).parameters()),
    }


LAYOUTS = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "no_sync": ("fsdp", {"no_sync": True, "reshard_after_forward": False}),
    "hsdp": ("fsdp", {"mesh": MeshOptions(dp_replicate=2)}),
    "tp": ("fsdp", {"mesh": MeshOptions(tp_size=2)}),
}


def checks():
    layouts = {name: options_of(engine, **changes) for name, (engine, changes) in LAYOUTS.items()}
    # 40 rows can be split in two, the 37 of the other cases cannot.
    test_step.tiny_decoder = functools.partial(tiny_decoder, vocab_size=40)
    with processes.processes(layouts["ddp"], torch.device("cpu")):
        return {
            "law": {
                name: law_of_the_step(options, NAMES if name in ("fsdp", "tp") else NAMES[:2])
                for name, options in layouts.items()
            },
            "sampling": {name: sampling(layouts[name]) for name in ("fsdp", "tp")},
            "messages": messages(),
        }


def compiled():
    """The law of the step with compiled blocks, and with compiled blocks that are recomputed."""
    layouts = {
        f"{engine} {kind}": options_of(engine, compile=True, activation_checkpointing=kind)
        for engine in ("ddp", "fsdp")
        for kind in ("none", "full")
    }
    with processes.processes(layouts["ddp none"], torch.device("cpu")):
        return {name: law_of_the_step(options, ["sft"]) for name, options in layouts.items()}
