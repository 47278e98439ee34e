"""What the tests of several processes run on each rank; `distllm.testing.gloo` starts them."""

import functools

import test_step
import torch
from test_step import NAMES, case, gradients, largest_difference

from distllm import registry
from distllm.engines import collectives, processes
from distllm.engines.base import build_engine
from distllm.engines.mesh import MeshOptions
from distllm.engines.options import HardwareOptions
from distllm.errors import DataError, OtherRankError
from distllm.optim.options import AdamWOptions
from distllm.testing.tiny import tiny_decoder
from distllm.types import sum_by_key

CPU = HardwareOptions(device="cpu", threads=1)


def options_of(engine, **changes):
    return registry.get("engine", engine).Options(name=engine, timeout_s=60, **changes)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def law_of_the_step(options, names=NAMES):
    """Compare gradients with a single process's, in fp64, the ranks holding uneven parts; and with a mean of means."""
    found = {}
    for name in names:
        model, objective, examples = case(name)
        expected = gradients(model, objective, examples, [8])
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
            grads = {n: whole(p.grad) for n, p in engine.model.named_parameters()}
            found[f"{name} {label}"] = largest_difference(expected, grads)
        clipped = engine._grad_norm(norm / 2).item()
        found[f"{name} norm"] = abs(clipped / norm - 1)
        grads = {n: 2 * whole(p.grad) for n, p in engine.model.named_parameters()}
        found[f"{name} clipped"] = largest_difference(expected, grads)
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


def law(engine, changes, names=None, vocab_size=None):
    if vocab_size:
        test_step.tiny_decoder = functools.partial(tiny_decoder, vocab_size=vocab_size)
    changes = {k: MeshOptions(**v) if k == "mesh" else v for k, v in changes.items()}
    options = options_of(engine, **changes)
    with processes.processes(options, torch.device("cpu")):
        return law_of_the_step(options, names or NAMES)


def checks():
    options = options_of("ddp")
    with processes.processes(options, torch.device("cpu")):
        return {"law": law_of_the_step(options), "messages": messages()}
