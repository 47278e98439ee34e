"""RMSNorm against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from distllm.layers.norms import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_torch(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(12, 1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(3, 4, 12, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 4, 12, dtype=dtype)
    got, expected = norm(x), F.rms_norm(x, (12,), norm.weight, 1e-3)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(got, expected, **tolerance)
    inputs = (x, norm.weight)
    for ours, reference in zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference, **tolerance)


def test_the_incoming_gradient_is_left_alone():
    norm, grad = RMSNorm(8, 1e-5), torch.randn(2, 8)
    kept = grad.clone()
    torch.autograd.grad(norm(torch.randn(2, 8, requires_grad=True)), norm.weight, grad)
    assert torch.equal(grad, kept)


def test_autocast_gives_bfloat16_and_float32_gradients():
    norm = RMSNorm(8, 1e-5)
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == norm.weight.grad.dtype == torch.float32


def test_compiled_formula_is_the_same():
    torch.manual_seed(0)
    norm, x = RMSNorm(8, 1e-5), torch.randn(4, 8)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x), rtol=0, atol=1e-6)
