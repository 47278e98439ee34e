"""What the tests of combined settings run on each rank: three steps of one model under one layout after the other."""

import functools
from unittest import mock

import torch
from on_zero import Run
from torch._dynamo.utils import counters

from distllm import registry
from distllm.engines import processes
from distllm.engines.mesh import MeshOptions
from distllm.testing.gloo import patient
from distllm.testing.tiny import tiny_decoder


def options_of(engine, changes):
    mesh = {"mesh": MeshOptions(**changes["mesh"])} if "mesh" in changes else {}
    return registry.get("engine", engine).Options(
        name=engine, timeout_s=round(patient(300)), **{**changes, **mesh}
    )


def run(cells):
    """Train under each of `cells` (engine, options), two uneven micro-batches a step; return losses, norms, weights, compiled graphs."""
    import test_step  # the folder of that file is in the path on the ranks alone

    # 40 rows can be split in two, 37 cannot.
    even = mock.patch.object(
        test_step, "tiny_decoder", functools.partial(tiny_decoder, vocab_size=40)
    )
    found = []
    with even, processes.processes(options_of(*cells[0]), torch.device("cpu")):
        for engine, changes in cells:
            torch._dynamo.reset()
            counters.clear()
            made = Run(options_of(engine, changes), "sft")
            steps = made.steps() | {"weights": made.weights()}
            found.append(steps | {"graphs": counters["stats"]["unique_graphs"]})
            made.engine.close()
    return found
