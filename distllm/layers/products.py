"""Matrix products in a dtype that the device multiplies fast: a CPU without bf16 instructions widens the factors.

There torch multiplies bf16 in plain loops, at 1/10 to 1/70 of the speed of float32. The product of two bf16 numbers is exact in
float32, and hardware too sums in float32 and rounds the sum to bf16: widened factors and a rounded result are that arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distllm.layers.precision import compute_dtype

HAS_FAST_BF16 = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether this CPU multiplies bf16 by instructions of its own."""


def product_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype in which factors of `dtype` are multiplied on `device`: its own, or float32."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if dtype == torch.bfloat16 and on_cpu and not HAS_FAST_BF16 else dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `F.linear`, in the dtype heavy work runs in.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].
    """
    dtype = compute_dtype(weight)
    if product_dtype(dtype, x.device) == dtype:
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return _multiply(x, weight, bias, dtype)[0]
    return _WidenedLinear.apply(x, weight, bias, dtype)


class Linear(nn.Linear):
    """A linear layer that multiplies by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., in]."""
        return linear(x, self.weight, self.bias)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (x @ weight.T + bias, `x`), both in `dtype`."""
    x = x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = F.linear(
            x.float(), weight.to(dtype).float(), None if bias is None else bias.to(dtype).float()
        )
    return out.to(dtype), x


class _WidenedLinear(torch.autograd.Function):
    """Keeps what plain bf16 keeps: nothing wide outlives a call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        out, narrow = _multiply(x, weight, bias, dtype)
        ctx.save_for_backward(narrow, weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        wide, rows = grad.float(), grad.flatten(0, -2).float()
        grads: list[Tensor | None] = [None, None, None]
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grads[0] = (wide @ weight.to(x.dtype).float()).to(dtype)
            if ctx.needs_input_grad[1]:
                grads[1] = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grads[2] = rows.sum(dim=0).to(bias_dtype)
        return *grads, None
