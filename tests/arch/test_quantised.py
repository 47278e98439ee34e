"""Adapters beside weights in 4 bits: against bitsandbytes' own layer, and against adapters beside the rounded weights."""

import copy

import pytest
import torch
from patched import planted
from torch import nn

from distllm.arch import adapter, quantised
from distllm.arch.adapter import AdapterOptions, attach, merged, switched_off
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.io import load_model, save_model
from distllm.arch.quantised import BYTES_PER_WEIGHT, Linear4bit, weights_given_back

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
pytest.importorskip("peft")

SHAPE = {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128, "qkv_bias": True}  # fmt: skip
LORA = {"name": "lora", "rank": 4, "alpha": 8.0}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def adapted_model(device="cpu", **options):
    """Build a model whose biases and adapters are not zero."""
    model = Decoder(DecoderOptions(**SHAPE), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        attach(model, AdapterOptions(**LORA, **options), seed=1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(device)


def on_rounded_weights(model):
    """Return the same model with whole weights, each what its 4 bits stand for."""
    whole = adapted_model().to(next(model.parameters()).device)
    own = dict(whole.named_parameters())
    with torch.no_grad():
        for name, weight in weights_given_back(model).items():
            own[name].copy_(weight)
    return whole


def ids(device):
    return torch.arange(60, device=device).view(3, 20) % 96


def loss_and_gradients(model):
    logits = model(ids(next(model.parameters()).device)).logits
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = logits.float().square().mean() + logits.float()[..., 3].sum() / 50
    return logits.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_that_of_bitsandbytes(device, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(128, 96, bias=False)
    ours = Linear4bit(copy.deepcopy(layer)).to(device)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compute_dtype=dtype)
    theirs.weight = bitsandbytes.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")  # fmt: skip
    theirs = theirs.to(device)
    inputs = [torch.randn(5, 128).to(device, dtype).requires_grad_(True) for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = [m(x) for m, x in zip((ours, theirs), inputs, strict=True)]
    assert found[0].dtype == found[1].dtype == dtype
    for out in found:
        (out.float() ** 2).sum().backward()
    room = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    torch.testing.assert_close(found[0], found[1], **room)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0.02, atol=room["atol"])
    assert 0.001 < (ours.given_back().cpu() - layer.weight).abs().max() < 0.03, "rounded, not lost"


def check_gradients(device):
    model = adapted_model(device, base_bits=4)
    logits, gradients = loss_and_gradients(model)
    whole_logits, whole_gradients = loss_and_gradients(on_rounded_weights(model))
    torch.testing.assert_close(logits, whole_logits, rtol=0, atol=1e-5)
    assert gradients.keys() == whole_gradients.keys()
    largest = max(g.abs().max() for g in whole_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - whole_gradients[name]).abs().max() < 1e-5 * largest, name
    plain = adapted_model(device)
    assert (loss_and_gradients(plain)[0] - logits).abs().max() > 1e-3, "the rounding is felt"


@pytest.mark.parametrize("device", DEVICES)
def test_logits_and_gradients_are_those_beside_the_rounded_weights(device):
    check_gradients(device)
    bug = ("return grad @ ctx.layer", "return 0.9 * grad @ ctx.layer")
    with planted(quantised, *bug), pytest.raises(AssertionError):
        check_gradients(device)


@pytest.mark.parametrize("device", DEVICES)
def test_every_linear_layer_of_the_blocks_takes_half_a_byte_per_weight(device):
    model = adapted_model(device, base_bits=4, targets=["q_proj"])
    held = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(held) == 7 * 2 and not any(p.requires_grad for m in held for p in m.parameters())
    for layer in held:
        scales = [layer.scales.absmax, layer.scales.state2.absmax]
        size = layer.weight.nbytes + sum(t.nbytes for t in scales)
        number = layer.in_features * layer.out_features
        assert size == pytest.approx(BYTES_PER_WEIGHT * number, rel=0.02)
    assert len(adapter.adapted(model)) == 2


def test_what_is_exported_is_what_was_trained(tmp_path):
    model = adapted_model(base_bits=4)
    save_model(model, None, tmp_path / "m", state=merged(model, dict(model.state_dict())))
    alone, _ = load_model(tmp_path / "m")
    given = ids("cpu")
    with torch.no_grad():
        torch.testing.assert_close(alone(given).logits, model(given).logits, rtol=0, atol=1e-5)
        with switched_off(model):
            off = model(given).logits
    assert (off - alone(given).logits).abs().max() > 1e-2
