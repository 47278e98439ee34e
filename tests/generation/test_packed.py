"""Packed weights: the plain products' results, made anew at every call, gone afterwards."""

import pytest
import torch
from patched import with_bug
from test_generate import ids, run, tiny

from distllm.generation import generate as ours
from distllm.generation import packed
from distllm.generation.weights import lowered

X = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0))


def tied_and_biased(**changes):
    options = {"qkv_bias": True, "ff_bias": True, "head_bias": True, "tie_embeddings": True}
    return tiny(**(options | changes))


@pytest.mark.parametrize("head_bias", [False, True])
def test_products_are_those_of_plain_weights(head_bias):
    model = tied_and_biased(head_bias=head_bias)
    layer, head = model.layers[0].feed_forward.gate_proj, model.head
    with torch.no_grad():
        for module in (layer, head):
            if module.bias is not None:
                module.bias.add_(0.3)
        with torch.autocast("cpu", torch.bfloat16):
            plain = layer(X), head.multiply(X)
            with lowered(model, torch.bfloat16), packed.packed(model, torch.bfloat16, 5):
                fast = layer(X), head.multiply(X)
        for a, b in zip(plain, fast, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        with packed.packed(model, torch.float32, 5):
            assert "forward" in vars(layer)  # else this compares nothing
            torch.testing.assert_close(layer(X), X @ layer.weight.T + layer.bias)


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.sign(parameter), alpha=0.05)


def check_nothing_is_stale(module, monkeypatch):
    """Neither the next rollout nor the next forward sees weights from before an update."""
    monkeypatch.setattr(ours, "packed", module.packed)
    model, fresh = tiny(), tiny(seed=5)
    first = ids(run(model, num_samples=4))
    change(model)
    fresh.load_state_dict(model.state_dict())
    second = ids(run(model, num_samples=4))
    assert second == ids(run(fresh, num_samples=4)) != first
    change(model)
    untouched = tiny(seed=7)
    untouched.load_state_dict(model.state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, untouched(tokens).logits)


def test_nothing_is_stale(monkeypatch):
    check_nothing_is_stale(packed, monkeypatch)
    with pytest.raises(AssertionError):
        check_nothing_is_stale(
            with_bug(packed, "            delattr(module, name)\n", "            pass\n"),
            monkeypatch,
        )


def test_layers_are_as_before_even_after_an_error():
    model = tied_and_biased()
    with pytest.raises(ZeroDivisionError), packed.packed(model, torch.float32, 8):
        assert sum("forward" in vars(m) or "multiply" in vars(m) for m in model.modules()) == 15
        raise ZeroDivisionError
    assert not any("forward" in vars(m) or "multiply" in vars(m) for m in model.modules())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_has_no_packed_layout_is_left_alone():
    model = tiny().double()
    with packed.packed(model, torch.float64, 8):
        assert not any("forward" in vars(m) for m in model.modules())
    with packed.packed(tiny(), torch.bfloat16, 8):  # the weights are still float32
        assert not any("forward" in vars(m) for m in model.modules())
