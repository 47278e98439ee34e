"""Recomputing and compiling blocks changes memory and time, never a gradient."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.objectives.sft import SFT, SFTOptions
from distllm.optim.options import AdamWOptions
from distllm.testing.tiny import PAD_ID, chat_examples, tiny_decoder


def run(held=None, **changes):
    """Run one forward and backward in fp64; return the gradients, and the bytes held between the two."""
    engine = build_engine(
        "model",
        tiny_decoder().double(),
        options=EngineOptions(**changes),
        hardware=HardwareOptions(device="cpu", threads=1),
        precision="fp32",
        optim=AdamWOptions(),
    )
    objective = SFT(SFTOptions(), pad_id=PAD_ID)
    batch = objective.collate(chat_examples(6))
    sizes = {}

    def hold(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(hold, lambda tensor: tensor):
        engine.forward_backward(objective, [batch], objective.weights(batch))
    own = {p.untyped_storage()._cdata for p in engine.model.parameters()}
    held = sum(size for key, size in sizes.items() if key not in own)
    return {n: p.grad for n, p in engine.model.named_parameters()}, held


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        pytest.param({"compile": True, "activation_checkpointing": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_the_same(changes):
    expected, _ = run()
    found, _ = run(**changes)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_less_is_held_between_forward_and_backward():
    none, full = run()[1], run(activation_checkpointing="full")[1]
    assert full < 0.5 * none
