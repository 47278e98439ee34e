"""What ddp holds besides the model, and gives back. That it computes the same is in `test_ranks.py` and the matrix."""

import weakref

import pytest
import torch
import torch.distributed as dist

from distllm.engines.base import build_engine
from distllm.engines.ddp import DDPOptions
from distllm.engines.options import HardwareOptions
from distllm.optim.options import AdamWOptions
from distllm.testing.tiny import tiny_decoder


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_closed_engine_lets_go_of_the_process_group(alone):
    """A reducer that outlives the group can hang the process for ever, holding the interpreter's lock."""
    engine = build_engine(
        "policy",
        tiny_decoder(),
        options=DDPOptions(),
        hardware=HardwareOptions(device="cpu", threads=torch.get_num_threads()),
        precision="fp32",
        optim=AdamWOptions(),
    )
    reducer = weakref.ref(engine.caller.reducer)
    assert reducer() is not None
    engine.close()
    assert reducer() is None
