"""Widened bf16 products: bf16's own numbers by float64 arithmetic, its memory, and none left that torch would do in loops."""

import pytest
import torch
from patched import planted
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.encoder_decoder import EncoderDecoder, EncoderDecoderOptions
from distllm.arch.glm import GLM, GLMOptions
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.layers import products
from distllm.layers.products import Linear

SHAPE = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48}
MODELS = {
    "decoder": lambda: Decoder(DecoderOptions(**SHAPE, n_kv_heads=2)),
    "softcap": lambda: Decoder(DecoderOptions(**SHAPE, attention_softcap=5.0, logit_softcap=9.0)),
    "encoder_decoder": lambda: EncoderDecoder(EncoderDecoderOptions(**SHAPE)),
    "glm": lambda: GLM(GLMOptions(**SHAPE, blank_id=1, start_id=2)),
}


@pytest.fixture(params=[False, True], ids=["loops", "hardware"])
def fast(request, monkeypatch):
    monkeypatch.setattr(products, "HAS_FAST_BF16", request.param)
    return request.param


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(products, "HAS_FAST_BF16", False)


def check_layer(weights):
    """Result and gradients are float64's of the rounded factors, within the rounding of bf16."""
    torch.manual_seed(0)
    layer = Linear(200, 40).to(weights)
    x, up = torch.randn(3, 5, 200, requires_grad=True), torch.randn(3, 5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.backward(up.bfloat16())
    a, w, b, g = (
        t.detach().bfloat16().double() for t in (x, layer.weight, layer.bias, up.bfloat16())
    )
    rows = g.flatten(0, 1)
    for ours, exact in (
        (out, a @ w.T + b),
        (x.grad, g @ w),
        (layer.weight.grad, rows.T @ a.flatten(0, 1)),
        (layer.bias.grad, rows.sum(dim=0)),
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_layer_computes_what_bf16_computes(fast, weights):
    check_layer(weights)


def test_a_wrong_gradient_is_noticed(without):
    with (
        planted(products, "(rows.t() @ x.flatten", "(rows.t() @ -x.flatten"),
        pytest.raises(AssertionError),
    ):
        check_layer(torch.float32)


def test_frozen_weights_get_no_gradient(without):
    layer = Linear(8, 4, bias=False).requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(
        x.grad, layer.weight.bfloat16().float().sum(0).expand(2, 8), rtol=0.01, atol=0.01
    )


class Products(TorchDispatchMode):
    """Lists the dtypes of every matrix product's factors."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise") or "attention" in name:
            given = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            self.dtypes += [a.dtype for a in given]
        return func(*args, **(kwargs or {}))


def check_no_loops(name):
    model, prompts = MODELS[name](), [[5, 6, 7], [8, 9, 10, 11]]
    with Products() as seen, torch.autocast("cpu", torch.bfloat16):
        batch = model.join(prompts, [[12, 13, 14], [15, 16]], 0)
        given = {
            key: getattr(batch, key)
            for key in ("decoder_input_ids", "position_ids", "prefix_lengths")
            if getattr(batch, key, None) is not None
        }
        out = model(batch.input_ids, batch.attention_mask, compute_logits=False, **given)
        logprobs, entropy = model.head.logprobs(out.last_hidden_state, batch.labels)
        loss = logprobs.sum() + entropy.sum()
        loss = loss + model.head.loss(out.last_hidden_state, batch.labels)
    with seen:
        loss.backward()
    forward = len(seen.dtypes)
    with seen, torch.autocast("cpu", torch.bfloat16):
        options = GenerationOptions(max_new_tokens=4)
        generate(model, prompts, options, end_ids=(), pad_id=0, num_samples=2)
    assert forward > 60 and len(seen.dtypes) > forward + 60
    assert torch.bfloat16 not in seen.dtypes
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_training_and_sampling_make_no_product_in_bf16(without, name):
    check_no_loops(name)


def test_one_product_in_bf16_is_noticed(without):
    with (
        planted(products, "    if product_dtype(dtype, x.device) == dtype:\n", "    if True:\n"),
        pytest.raises(AssertionError),
    ):
        check_no_loops("decoder")
